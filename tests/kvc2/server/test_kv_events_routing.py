"""Two daemons and a router that hears both: a prompt goes where its prefix is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.doubles.replicas import SIZE, Served, prompt, two_replicas
from tests.doubles.waiting import wait_until


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Served]]:
    with two_replicas(tmp_path) as found:
        yield found


def chosen(replicas: list[Served], tokens: np.ndarray) -> int | None:
    """Where most of the prompt is; None: nowhere."""
    cached = [each.cached(tokens) for each in replicas]
    return cached.index(max(cached)) if max(cached) else None


def test_a_prompt_goes_to_the_replica_that_has_its_prefix(replicas: list[Served]) -> None:
    first, second = prompt(1), prompt(2)
    replicas[0].store(first)
    replicas[1].store(second)
    wait_until(lambda: chosen(replicas, first) == 0)
    wait_until(lambda: chosen(replicas, second) == 1)
    asked = np.concatenate([first, prompt(3)])  # the next turn of what the first one has
    assert chosen(replicas, asked) == 0
    found = replicas[0].client.match(replicas[0].handle, asked)
    assert found.matched_tokens == 8 * SIZE
    assert chosen(replicas, prompt(4)) is None
    replicas[1].store(asked)
    wait_until(lambda: chosen(replicas, asked) == 1)  # it has more of it now


def test_another_namespace_of_the_same_tokens_is_not_taken_for_it(replicas: list[Served]) -> None:
    tokens = prompt(1)
    replicas[0].store(tokens)
    wait_until(lambda: replicas[0].cached(tokens) == 8)
    assert replicas[0].cached(tokens, salt="kvc2-" + "00" * 32) == 0


def test_what_is_evicted_is_not_routed_to_and_what_the_disk_has_is(
    replicas: list[Served], tmp_path: Path
) -> None:
    here, tokens = replicas[0], prompt(1)
    here.store(tokens)
    with here.admin() as asked:
        assert not asked.flush().not_durable_blocks
        wait_until(lambda: here.listener.catch_up().there.keys() == {"CPU", "STORAGE"})
        asked.evict("cpu")
        wait_until(lambda: not here.listener.catch_up().there.get("CPU"))
        assert here.cached(tokens) == 8
        assert len(here.listener.replica.there["STORAGE"]) == 8
        asked.evict("disk")
        wait_until(lambda: here.cached(tokens) == 0)


def test_a_daemon_that_comes_back_tells_what_its_disk_has(tmp_path: Path) -> None:
    here, tokens = Served(tmp_path / "a"), prompt(1)
    here.store(tokens)
    with here.admin() as asked:
        assert not asked.flush().not_durable_blocks
    here.close()
    again = Served(tmp_path / "a")
    wait_until(lambda: again.cached(tokens) == 8)
    assert again.listener.replica.there.keys() == {"STORAGE"}
    assert again.listener.replica.orphans == 0
    again.close()

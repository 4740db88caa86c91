"""Our KV events read by others' code: vLLM's own types, and Dynamo's indexer, which chooses the
replica that has a prompt's prefix."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.processes import free_port
from tests.doubles.replicas import SIZE, Served, prompt, two_replicas
from tests.doubles.waiting import wait_until
from tests.peers.environments import dynamo_python, vllm_python

pytestmark = pytest.mark.peers
DECODER = Path(__file__).with_name("kv_events.py")
BLOCKS = 8


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Served]]:
    with two_replicas(tmp_path) as found:
        yield found


def decoded(folder: Path) -> list[dict[str, Any]]:
    """A daemon's batches, as vLLM reads them."""
    done = subprocess.run(
        [str(vllm_python()), str(DECODER), str(folder / "events")],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(1200)
def test_vllm_reads_what_it_would_have_written(replicas: list[Served], tmp_path: Path) -> None:
    here, tokens = replicas[0], prompt(1)
    here.store(tokens)
    wait_until(lambda: here.cached(tokens) == BLOCKS)
    wait_until(lambda: len(here.listener.catch_up().there.get("STORAGE", ())) == BLOCKS)
    with here.admin() as asked:
        asked.evict("cpu")
    wait_until(lambda: not here.listener.catch_up().there.get("CPU", ()))
    batches = decoded(tmp_path / "a")
    assert [each["number"] for each in batches] == list(range(len(batches)))
    assert all(each["same"] and each["rank"] == 0 for each in batches)
    events = [event for each in batches for event in each["events"]]
    assert events[0]["kind"] == "AllBlocksCleared"
    stored = next(each for each in events if each["kind"] == "BlockStored")
    assert stored["token_ids"] == tokens.tolist()
    assert (stored["block_size"], stored["medium"]) == (SIZE, "CPU")
    removed = [each for each in events if each["kind"] == "BlockRemoved"]
    gone = [block for each in removed for block in each["block_hashes"]]
    assert sorted(gone) == sorted(stored["block_hashes"])


class Indexer:
    """Dynamo's, as its users start it."""

    def __init__(self, folder: Path) -> None:
        self._url = f"http://127.0.0.1:{(port := free_port())}"
        self._log = folder / "indexer.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(dynamo_python()), "-m", "dynamo.indexer", "--port", str(port)],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        wait_until(self._healthy)

    def _healthy(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        with suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{self._url}/health", timeout=5).read()
            return True
        return False

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}/{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        answer: dict[str, Any] = json.loads(urllib.request.urlopen(request, timeout=10).read())
        return answer

    def register(self, instance: int, path: Path) -> None:
        sockets = {"endpoint": f"ipc://{path}", "replay_endpoint": f"ipc://{path}.replay"}
        what = {"instance_id": instance, "model_name": "m", "block_size": SIZE}
        self._post("register", {**sockets, **what})

    def matched(self, tokens: np.ndarray) -> dict[str, int]:
        """By instance, the tokens of the longest prefix that it has in any tier."""
        asked = {"token_ids": tokens.tolist(), "model_name": "m"}
        found = self._post("query", asked)["instances"]
        return {instance: each["longest_matched"] for instance, each in found.items()}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.mark.timeout(1200)
def test_dynamo_chooses_the_replica_that_has_the_prefix(
    replicas: list[Served], tmp_path: Path
) -> None:
    first, second, third = prompt(1), prompt(2), prompt(3)
    replicas[0].store(first)  # before it listens: it has it by replay
    indexer = Indexer(tmp_path)
    try:
        for instance, name in ((1, "a"), (2, "b")):
            indexer.register(instance, tmp_path / name / "events")
        wait_until(lambda: heard(indexer, replicas[1]))
        replicas[1].store(second)
        replicas[0].store(third)
        wait_until(lambda: indexer.matched(first) == {"1": SIZE * BLOCKS})
        wait_until(lambda: indexer.matched(second) == {"2": SIZE * BLOCKS})
        asked = np.concatenate([third, prompt(4)])
        wait_until(lambda: indexer.matched(asked) == {"1": SIZE * BLOCKS})
        assert indexer.matched(prompt(5)) == {}
        with replicas[0].admin() as asked_of:
            assert not asked_of.flush().not_durable_blocks
            asked_of.evict("cpu")
            asked_of.evict("disk")
        wait_until(lambda: indexer.matched(third) == {})
        assert indexer.matched(second) == {"2": SIZE * BLOCKS}
    finally:
        indexer.close()


def heard(indexer: Indexer, replica: Served) -> bool:
    """Its subscription has come: it hears of what is stored now."""
    tokens = np.random.default_rng().integers(0, 50_000, SIZE, np.uint32)
    replica.store(tokens)
    with suppress(AssertionError):
        wait_until(lambda: bool(indexer.matched(tokens)), 0.5)
        return True
    return False

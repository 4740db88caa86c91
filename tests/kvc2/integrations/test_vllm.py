"""vLLM's connector by its contract, with stand-ins of its scheduler and its ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvc2.errors import InvalidConfig
from kvc2.host.file_stamp import Stamp
from kvc2.integrations.vllm import connector
from kvc2.integrations.vllm.identity import weights_digest
from kvc2.integrations.vllm.worker import Rank, caches_of
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.vllm import BLOCK, WAIT_S, Request, Vllm, image

PROMPT = list(range(100, 100 + 10 * BLOCK + 1))  # ten blocks, and the token that is always computed
TEN = 10 * BLOCK

Opened = Callable[..., Vllm]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    with ServedDaemon(serve_config(tmp_path, disk=True), cache=None) as served:
        yield served


@pytest.fixture
def opened(served: ServedDaemon) -> Iterator[Opened]:
    with ExitStack() as stack:

        def make(**options: Any) -> Vllm:
            vllm = Vllm(served.address, **options)
            stack.callback(vllm.close)
            assert vllm.client.wait_attached(WAIT_S)
            return vllm

        yield make


def stored(vllm: Vllm, name: str, tokens: list[int] = PROMPT, **more: Any) -> Request:
    """A prompt that was computed, kept and ended."""
    request = Request(name, tokens, **more)
    vllm.run(request)
    vllm.finish(request)
    vllm.settle()
    return request


@pytest.mark.parametrize("device_copies", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_one_engine_computed_another_loads(
    opened: Opened, device_copies: bool, asynchronous: bool
) -> None:
    options = {"device_copies": device_copies, "asynchronous": asynchronous}
    first, second = opened(**options), opened(**options)
    stored(first, "a")
    assert second.run(Request("b", PROMPT)) == TEN
    longer = PROMPT[:-1] + list(range(7 * BLOCK))
    assert second.run(Request("c", longer)) == TEN
    assert second.run(Request("d", [1, *PROMPT])) == 0


def test_ranks_of_another_number_read_the_same_blocks(opened: Opened) -> None:
    one, two, three = opened(ranks=1), opened(ranks=2), opened(ranks=2)
    stored(one, "a")
    assert two.run(Request("b", PROMPT)) == TEN
    other = [9, *PROMPT[1:]]
    stored(three, "c", other)
    assert one.run(Request("d", other)) == TEN


def test_more_ranks_than_heads_save_each_head_once() -> None:
    ranks = [Rank.of(each, 4, 2) for each in range(4)]
    assert ranks == [Rank(0, True), Rank(0, False), Rank(1, True), Rank(1, False)]


def test_a_salt_an_adapter_and_an_image_share_with_their_like_alone(opened: Opened) -> None:
    vllm = opened()
    stored(vllm, "a")
    assert vllm.run(Request("b", PROMPT, cache_salt="s")) == 0
    adapter = SimpleNamespace(lora_name="l", lora_path="none")
    assert vllm.run(Request("c", PROMPT, lora_request=adapter)) == 0
    seen = [image(5 * BLOCK + 1, BLOCK, "cat")]
    assert vllm.run(Request("d", PROMPT, mm_features=seen)) == 5 * BLOCK  # the text before it
    vllm.settle()
    assert vllm.run(Request("e", PROMPT, mm_features=seen)) == TEN
    dog = [image(5 * BLOCK + 1, BLOCK, "dog")]
    assert vllm.run(Request("f", PROMPT, mm_features=dog)) == 5 * BLOCK
    stored(vllm, "g", cache_salt="s")
    assert vllm.run(Request("h", PROMPT, cache_salt="s")) == TEN


def test_only_what_vllm_has_not_itself_is_loaded(opened: Opened) -> None:
    first, vllm = opened(), opened()
    stored(first, "a")
    request = Request("b", PROMPT)
    own = vllm.blocks(4)
    for rank in vllm.ranks:
        for index, block in enumerate(own):
            rank.compute(request, block, index)
    assert vllm.run(request, 4 * BLOCK, own=own) == 6 * BLOCK


def test_a_lookup_with_less_than_before_is_asked_anew(opened: Opened) -> None:
    first, vllm = opened(), opened()
    stored(first, "a")
    request = Request("b", PROMPT)
    assert vllm.ask(request, 6 * BLOCK) == (4 * BLOCK, False)
    assert vllm.ask(request, 8 * BLOCK) == (2 * BLOCK, False)
    assert vllm.run(request, 0) == TEN


def test_a_preempted_request_comes_back_as_a_hit(opened: Opened) -> None:
    vllm = opened()
    request = Request("a", PROMPT)
    assert vllm.run(request) == 0
    vllm.settle()
    assert vllm.run(request) == TEN  # asked again without an end: it was preempted
    vllm.finish(request)


def test_saves_that_find_no_page_are_made_up_for_later(opened: Opened) -> None:
    small, other = opened(staging=3, chunk=4 * BLOCK), opened()
    request = Request("a", PROMPT)
    small.run(request)
    while small.side._visits["a"].saving < 10:  # as it generates
        small.settle()
        small.step([("a", [], False, len(PROMPT), 0)])
    small.settle()
    assert other.run(Request("b", PROMPT)) == TEN


def test_leases_end_with_their_requests(opened: Opened, served: ServedDaemon) -> None:
    vllm = opened()
    requests = [stored(vllm, f"{each}") for each in range(3)]
    cut = Request("cut", PROMPT)
    vllm.ask(cut)
    vllm.finish(cut)  # aborted before it was scheduled
    vllm.settle()
    assert len(requests) == 3
    assert served.on_loop(served.daemon.cache.stats).leases == 0


def test_a_load_whose_session_ended_is_computed(opened: Opened, served: ServedDaemon) -> None:
    first, vllm = opened(), opened()
    stored(first, "a")
    request = Request("b", PROMPT)
    assert vllm.ask(request) == (TEN, False)
    session = vllm.sessions.session
    for attachment in list(served.daemon.attachments._open.values()):
        served.on_loop(lambda each=attachment: each.end("broken"))
    while vllm.sessions.session == session:
        vllm.client.wait_attached(WAIT_S)
    assert vllm.run(request) in (0, TEN)  # `run` compares the bytes of what it loaded
    assert vllm.run(Request("c", PROMPT)) in (0, TEN)


def test_without_a_daemon_all_is_computed(tmp_path: Path) -> None:
    vllm = Vllm(f"unix:{tmp_path}/none")
    request = Request("a", PROMPT)
    assert vllm.run(request) == 0
    vllm.finish(request)
    vllm.close()


def test_other_weights_are_another_model(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    first = weights_digest(tmp_path, tmp_path / "cache")
    assert weights_digest(tmp_path, tmp_path / "cache") == first
    (tmp_path / "a.safetensors").write_bytes(b"Weights")
    os.utime(tmp_path / "a.safetensors", (1, 1))
    second = weights_digest(tmp_path, tmp_path / "cache")
    assert first != second
    stored(opened(weights=first), "a")
    assert opened(weights=second).run(Request("b", PROMPT)) == 0
    assert opened(weights=first).run(Request("c", PROMPT)) == TEN
    with pytest.raises(InvalidConfig, match="weights"):
        weights_digest(tmp_path / "cache", None)


def test_a_kept_digest_is_not_that_of_files_whose_times_were_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "a.safetensors", tmp_path / "cache"
    path.write_bytes(b"weights")
    os.utime(path, (1, 1))
    first = weights_digest(tmp_path, cache)
    assert not cache.exists()  # it has just been changed
    monkeypatch.setattr(Stamp, "settled", True)
    assert weights_digest(tmp_path, cache) == first
    [kept] = cache.iterdir()
    kept.write_text("kept")
    assert weights_digest(tmp_path, cache) == "kept"
    with path.open("r+b") as file:
        file.write(b"Weights")
    os.utime(path, (1, 1))
    assert weights_digest(tmp_path, cache) not in ("kept", first)


def test_how_kv_lies_is_told_and_what_is_not_dense_is_refused() -> None:
    told = caches_of([torch.zeros(8, 2, BLOCK, 6), torch.zeros(8, 2, BLOCK, 3)])
    assert told.block_bytes == (2 * BLOCK * 24, 2 * BLOCK * 12)
    assert told.by_heads
    by_tokens = torch.zeros(8, BLOCK, 2, 6).permute(0, 2, 1, 3)
    assert not caches_of([by_tokens]).by_heads
    with pytest.raises(InvalidConfig, match="dense"):
        caches_of([torch.zeros(2, 8, 2, BLOCK, 6).permute(1, 0, 2, 3, 4)])
    with pytest.raises(InvalidConfig, match="one dtype"):
        caches_of([torch.zeros(8, 2, 4, 6), torch.zeros(8, 2, 4, 6, dtype=torch.int8)])


def config(**changes: Any) -> tuple[Any, Any]:
    parallel = {"pipeline_parallel_size": 1, "tensor_parallel_size": 1, "nnodes": 1}
    for name in list(changes):
        if name in parallel:
            parallel[name] = changes.pop(name)
    policy = changes.pop("kv_load_failure_policy", "recompute")
    groups = [
        SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size))
        for size in changes.pop("block_sizes", [16])
    ]
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
    )
    return made, SimpleNamespace(kv_cache_groups=groups)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_load_failure_policy": "fail"}, "kv_load_failure_policy"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"nnodes": 2}, "nnodes"),
        ({"block_sizes": [16, 16]}, "kv cache groups"),
        ({"block_sizes": [24]}, "--block-size"),
        ({"block_sizes": [1024]}, "--block-size"),
    ],
)
def test_what_it_does_not_carry_is_refused_at_the_start(
    changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "check_version", lambda: None)
    connector.check(*config())
    with pytest.raises(InvalidConfig, match=named):
        connector.check(*config(**changes))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "address"),
        ({"address": "unix:/s", "adress": 1}, "adress"),
        ({"address": "unix:/s", "staging_gb": 0}, "staging_gb"),
    ],
)
def test_an_unknown_or_odd_setting_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidConfig, match=named):
        connector.Settings.of(given)
    assert connector.Settings.of({"address": "unix:/s"}).staging_gb is None

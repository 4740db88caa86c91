"""Greedy output is the same, token for token in fp32, wherever the prefix comes from.

One daemon and one engine, real processes, for all tests of this file; the truth is an engine
without a daemon. Every prompt is its test's own, so that the tests don't feed each other.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.asking import ask
from engine.settings import EngineConfig
from tests.system.daemon import DaemonProcess, loading_daemon
from tests.system.engine import EngineProcess, Truth, prompt, small_model, without_cache

PAGES = 160  # 2,560 tokens: the tests below fill it several times
FLAGS = ("--num-pages", str(PAGES), "--chunk-size", "64", "--max-running", "4")
STREAMED = ("--expert-placement-strategy", "random", "--gpu-prefill-token-threshold", "24")
MOVING = ("--gpu-experts-ratio", "0.5", "--enable-dynamic-expert-update")


def promoted_blocks(daemon: DaemonProcess) -> float:
    counters = daemon.admin().stats().counters
    into_gpu = [name for name in counters if name.startswith("transfer_blocks_total")]
    return sum(counters[name] for name in into_gpu if "target=gpu" in name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def truth(model: Path) -> Iterator[Truth]:
    with without_cache(
        EngineConfig(model=model, num_pages=PAGES, chunk_size=64, threads=1)
    ) as answer:
        yield answer


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with loading_daemon(tmp_path_factory.mktemp("daemon")) as process:
        yield process


@pytest.fixture(scope="module")
def engine(
    model: Path, daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    log = tmp_path_factory.mktemp("engine") / "log"
    with EngineProcess(model, log, "--kvc2", daemon.address, *FLAGS) as process:
        process.wait_attached()
        yield process


def test_from_the_gpu_tier(engine: EngineProcess, truth: Truth) -> None:
    tokens = prompt(300, 1)
    cold, warm = engine.complete(tokens), engine.complete(tokens)
    assert cold.tokens == warm.tokens == truth(tokens)
    assert (cold.matched, warm.matched) == (0, 288)
    assert warm.tiers["gpu"] == 288
    assert warm.details["prefilled_tokens"] == 12
    assert warm.body["usage"]["prompt_tokens_details"]["cached_tokens"] == 288


def test_from_the_cpu_tier(engine: EngineProcess, daemon: DaemonProcess, truth: Truth) -> None:
    tokens = prompt(300, 2)
    engine.complete(tokens)
    daemon.empty("gpu")
    warm = engine.complete(tokens)
    assert warm.tokens == truth(tokens)
    assert warm.tiers == {"gpu": 0, "cpu": 288, "disk": 0, "remote": 0}


def test_from_the_disk_tier(engine: EngineProcess, daemon: DaemonProcess, truth: Truth) -> None:
    tokens = prompt(300, 3)
    engine.complete(tokens)
    daemon.empty("gpu", "cpu")
    warm = engine.complete(tokens)
    assert warm.tokens == truth(tokens)
    assert warm.tiers == {"gpu": 0, "cpu": 0, "disk": 288, "remote": 0}


def test_after_eviction_under_pressure(
    engine: EngineProcess, daemon: DaemonProcess, truth: Truth
) -> None:
    prompts = [prompt(500, seed) for seed in range(40, 48)]  # 4,000 tokens in a pool of 2,560
    wanted = [truth(tokens) for tokens in prompts]
    cold = [engine.complete(tokens) for tokens in prompts]
    assert [each.tokens for each in cold] == wanted
    assert [each.matched for each in cold] == [0] * 8
    # 31 full blocks each: the daemon knows them all, and the pool can't hold them all
    assert daemon.admin().stats().blocks >= 8 * 31 > PAGES
    promoted = promoted_blocks(daemon)
    warm = [engine.complete(tokens) for tokens in prompts]
    assert [each.tokens for each in warm] == wanted
    below = sum(each.tiers["cpu"] + each.tiers["disk"] for each in warm)
    assert below > 0  # these had lost their pages, and hit all the same
    # counted after the engine has seen it
    engine.wait_until(lambda: promoted_blocks(daemon) - promoted == below // 16)


def test_a_half_shared_prefix(engine: EngineProcess, truth: Truth) -> None:
    shared = prompt(200, 5)
    engine.complete(shared + prompt(100, 6))
    other = shared + prompt(100, 7)
    warm = engine.complete(other)
    assert warm.tokens == truth(other)
    assert warm.matched == 192


def test_the_next_turn_hits_what_was_generated(engine: EngineProcess, truth: Truth) -> None:
    tokens = prompt(40, 8)
    first = engine.complete(tokens, 40)
    turn = tokens + first.tokens + prompt(20, 9)
    second = engine.complete(turn)
    assert second.tokens == truth(turn)
    assert second.matched == 64  # 79 tokens had KV


def test_concurrent_identical_prompts_are_prefilled_once(
    engine: EngineProcess, truth: Truth
) -> None:
    tokens = prompt(600, 10)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: engine.complete(tokens), range(4)))
    assert [a.tokens for a in answers] == [truth(tokens)] * 4
    assert sum(a.details["prefilled_tokens"] for a in answers) == 600 + 3 * 8


def test_a_batch_of_different_prompts(engine: EngineProcess, truth: Truth) -> None:
    prompts = [prompt(30 + 70 * i, 20 + i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda p: engine.complete(p, 24), prompts))
    for tokens, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == truth(tokens, 24)


def test_after_the_daemon_was_killed_and_restarted(
    engine: EngineProcess, daemon: DaemonProcess, truth: Truth
) -> None:
    tokens = prompt(300, 11)
    engine.complete(tokens)
    daemon.make_durable()
    daemon.kill()
    engine.wait_attached(False)
    alone = engine.complete(tokens)
    assert alone.tokens == truth(tokens)
    assert alone.matched == 0
    daemon.start()
    engine.wait_attached()
    warm = engine.complete(tokens)
    assert warm.tokens == truth(tokens)
    assert warm.tiers["disk"] == 288


def test_after_both_were_killed_and_restarted(model: Path, truth: Truth, tmp_path: Path) -> None:
    tokens, log = prompt(300, 18), tmp_path / "log"
    disk = ("--disk-path", str(tmp_path / "disk"), "--disk-size-gb", "0.2")
    with DaemonProcess(tmp_path, *disk) as daemon:
        flags = ("--kvc2", daemon.address, *FLAGS)
        with EngineProcess(model, log, *flags) as first:
            first.wait_attached()
            assert first.complete(tokens).tokens == truth(tokens)
            daemon.make_durable()
            daemon.kill()
            assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        daemon.start()
        with EngineProcess(model, log, *flags) as second:
            second.wait_attached()
            warm = second.complete(tokens)
            assert warm.tokens == truth(tokens)
            assert warm.tiers == {"gpu": 0, "cpu": 0, "disk": 288, "remote": 0}


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_daemon_that_goes_away_in_mid_request(
    engine: EngineProcess, daemon: DaemonProcess, truth: Truth, how: str
) -> None:
    # a silent daemon may yet write its pages, so that only granted ones hold what comes: enough
    # for the answers of both, once the prompts of both are computed
    tokens, most = (prompt(500, 12), 300) if how == "killed" else (prompt(500, 13), 60)
    begun = engine.metric("kvc2_engine_ttft_seconds_count")
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(engine.complete, tokens, most + i) for i in range(2)]
        engine.wait_until(lambda: engine.metric("kvc2_engine_ttft_seconds_count") == begun + 2)
        daemon.kill() if how == "killed" else daemon.freeze()
    try:
        for i, answer in enumerate(answers):
            assert answer.result().tokens == truth(tokens, most + i)
        engine.wait_attached(False)
        short = tokens[:100]
        assert engine.complete(short, 4).tokens == truth(short, 4)
    finally:  # the tests below share it
        daemon.start() if how == "killed" else daemon.thaw()
    engine.wait_attached()
    assert engine.complete(tokens, 4).tokens == truth(tokens, 4)
    again = engine.complete(tokens, 4)
    assert again.tokens == truth(tokens, 4)
    assert again.matched == 496


def test_a_caller_who_hangs_up_frees_its_pages(
    engine: EngineProcess, daemon: DaemonProcess
) -> None:
    stream = engine.openai.completions.create(
        model=engine.model_name,
        prompt=prompt(200, 14),
        max_tokens=1500,
        stream=True,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert engine.metric("kvc2_engine_running") == 1
    stream.close()
    engine.wait_until(lambda: engine.metric("kvc2_engine_running") == 0)
    engine.wait_until(lambda: daemon.admin().stats().leases == 0)
    assert engine.metric("kvc2_engine_requests_total", outcome="cancelled") >= 1
    engine.wait_until(lambda: engine.metric("kvc2_engine_pages", owner="used") == 0)


def test_a_second_engine_hits_what_the_first_computed(
    model: Path, engine: EngineProcess, daemon: DaemonProcess, truth: Truth, tmp_path: Path
) -> None:
    """Its experts lie elsewhere, and move: what either computed is a hit for the other."""
    tokens, counts = prompt(300, 15), tmp_path / "counts.json"
    flags = ("--kvc2", daemon.address, *FLAGS, *MOVING, "--expert-statistics", str(counts))
    with EngineProcess(model, tmp_path / "log", *flags) as other:
        other.wait_attached()
        engine.complete(tokens)
        daemon.make_durable()
        warm = other.complete(tokens)
        assert warm.tokens == truth(tokens)
        assert warm.tiers["cpu"] == 288
        turn = tokens + warm.tokens + prompt(100, 16)
        other.complete(turn)
        daemon.make_durable()
        back = engine.complete(turn)
        assert back.tokens == truth(turn)
        assert back.matched == 400
        with ThreadPoolExecutor(4) as pool:
            both = prompt(700, 17)
            answers = list(pool.map(lambda e: e.complete(both), [engine, other] * 2))
        assert [a.tokens for a in answers] == [truth(both)] * 4
        told = ask(other.url, "", "experts")
        assert 0 < told["device_share"] < 1
        assert ask(other.url, "", "experts/save", post=True) == {"saved": str(counts)}
        assert other.stop() == 0
    assert json.loads(counts.read_text())["counts"]
    assert daemon.admin().stats().sessions[0].pool.pages == PAGES


def test_under_load_a_hit_gives_the_tokens_that_any_placement_gives(
    model: Path, engine: EngineProcess, daemon: DaemonProcess, truth: Truth, tmp_path: Path
) -> None:
    """All experts in one place here; there some hot ones, which move, and prefills on the device.
    Both compute, and find, what the other computed, at the same time."""
    shared = [prompt(160, seed) for seed in (50, 51, 52)]
    prompts = [shared[i % 3] + prompt(40 + 10 * i, 60 + i) for i in range(9)]
    wanted = [truth(tokens, 12) for tokens in prompts]
    flags = ("--kvc2", daemon.address, *FLAGS, *MOVING, *STREAMED)
    with EngineProcess(model, tmp_path / "log", *flags) as other:
        other.wait_attached()
        for turn in range(3):  # each prompt at both, each time after other ones
            asked = [
                (engine if (i + turn + side) % 2 else other, i) for side in (0, 1) for i in range(9)
            ]
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(lambda a: a[0].complete(prompts[a[1]], 12), asked))
            for (_, i), answer in zip(asked, answers, strict=True):
                assert answer.tokens == wanted[i]
            daemon.empty("gpu")
        told = ask(other.url, "", "experts")
        assert 0 < told["device_share"] < 1
        assert told["prefill"]["copied"] > 0
        matched = sum(
            other.metric("kvc2_engine_matched_tokens_total", tier=tier) for tier in ("gpu", "cpu")
        )
        assert matched > 1000
        assert other.stop() == 0


def test_host_memory_that_moves_between_kv_and_experts_changes_no_token(
    model: Path, engine: EngineProcess, daemon: DaemonProcess, truth: Truth, tmp_path: Path
) -> None:
    """Four prompts at once need more pages than KV has at first: experts give them up. Hits are
    those of any other engine."""
    prompts = [prompt(460, seed) for seed in (80, 81, 82, 83)]
    wanted = [truth(tokens, 12) for tokens in prompts]
    flags = ("--kvc2", daemon.address, *FLAGS[2:], "--host-memory-gb", "0.002")
    with EngineProcess(model, tmp_path / "log", *flags) as other:
        other.wait_attached()
        engine.complete(prompts[0])
        daemon.make_durable()
        for _ in range(3):
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda tokens: other.complete(tokens, 12), prompts))
            assert [each.tokens for each in answers] == wanted
            now = ask(other.url, "", "experts")["host_budget"]["now"]
            assert now["experts_gb"] + now["kv_gb"] <= 0.0021  # each is rounded
            daemon.empty("gpu")
        assert other.metric("kvc2_engine_matched_tokens_total", tier="cpu") >= 448
        assert other.stop() == 0


def test_what_deferral_computed_is_no_hit_for_who_does_not_defer(
    model: Path, engine: EngineProcess, daemon: DaemonProcess, truth: Truth, tmp_path: Path
) -> None:
    tokens = prompt(200, 90)
    flags = ("--kvc2", daemon.address, *FLAGS, "--max-deferred-experts-per-token", "1")
    with EngineProcess(model, tmp_path / "log", *flags) as late:
        late.wait_attached()
        first = late.complete(tokens)
        daemon.make_durable()
        again = late.complete(tokens)
        assert (first.matched, again.matched) == (0, 192)
        assert again.tokens == first.tokens
        plain = engine.complete(tokens)
        assert plain.matched == 0
        assert plain.tokens == truth(tokens)
        assert late.stop() == 0

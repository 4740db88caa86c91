"""The engine as `--device cuda` puts it together, as a process, on CPU tensors in a device's place:
torch's layers, flashinfer's stand-in, decode steps replayed from graphs on a tape, K and V of each
page side by side in the hostile driver's memory. Its tokens are those of an engine on the CPU
without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.settings import EngineConfig
from tests.cuda import hostile
from tests.system.daemon import DaemonProcess, loading_daemon
from tests.system.engine import EngineProcess, Truth, prompt, small_model, without_cache

PAGES, LAYERS, CHOSEN, ANSWER = 100, 3, 2, 8
LENGTH = 300  # of a prompt: 18 blocks, and 12 tokens more
FLAGS = ("--num-pages", str(PAGES), "--chunk-size", "64", "--max-running", "4")
FLAGS += ("--device", "cuda", "--attention-split-pages", "32")
WORDS = "seed=6,late_us=100"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def truth(model: Path) -> Iterator[Truth]:
    config = EngineConfig(model, num_pages=PAGES, chunk_size=64, threads=1)
    with without_cache(config) as answer:
        yield answer


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    with loading_daemon(folder, environment=hostile.environment(WORDS)) as process:
        yield process


def started(model: Path, daemon: DaemonProcess, log: Path, *more: str) -> EngineProcess:
    return EngineProcess(
        model,
        log,
        *("--kvc2", daemon.address, *FLAGS, *more),
        python=("-m", "tests.cuda.engine_on_hostile"),
        environment=hostile.environment(WORDS),
    )


@pytest.fixture(scope="module")
def engine(
    model: Path, daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    log = tmp_path_factory.mktemp("engine") / "log"
    with started(model, daemon, log) as process:
        process.wait_attached()
        yield process


def activations(engine: EngineProcess) -> int:
    return int(engine.http.get("/experts").json()["activations"])


def test_hits_of_every_tier_are_equal_to_no_cache(
    engine: EngineProcess, daemon: DaemonProcess, truth: Truth
) -> None:
    tokens = prompt(LENGTH, 1)
    expected, before = truth(tokens, ANSWER), activations(engine)
    cold = engine.complete(tokens)
    assert (cold.matched, cold.tokens) == (0, expected)
    # the last token of the answer is not computed, and no row that pads is counted
    assert activations(engine) - before == (300 + ANSWER - 1) * LAYERS * CHOSEN
    gpu = engine.complete(tokens)
    assert (gpu.tiers["gpu"], gpu.tokens) == (288, expected)
    daemon.empty("gpu")
    cpu = engine.complete(tokens)
    assert (cpu.tiers["cpu"], cpu.tokens) == (288, expected)
    daemon.empty("gpu", "cpu")
    disk = engine.complete(tokens)
    assert (disk.tiers["disk"], disk.tokens) == (288, expected)


def test_answers_of_several_requests_come_from_padded_graphs(
    engine: EngineProcess, truth: Truth
) -> None:
    prompts = [prompt(LENGTH, seed)[: 40 + 30 * seed] for seed in (2, 3, 4)]
    expected = [truth(tokens, ANSWER) for tokens in prompts]
    with ThreadPoolExecutor(3) as beside:
        for _ in range(2):
            answers = list(beside.map(engine.complete, prompts))
            assert [answer.tokens for answer in answers] == expected
    said = engine.log.read_text()
    assert "decode steps of 1 rows are replayed" in said
    assert "can't be captured" not in said


def test_cold_experts_beside_the_device_give_the_same_tokens(
    model: Path, daemon: DaemonProcess, truth: Truth, tmp_path: Path
) -> None:
    tokens, log = prompt(LENGTH, 6), tmp_path / "log"
    with started(model, daemon, log, "--gpu-experts-ratio", "0.5") as engine:
        engine.wait_attached()
        expected = truth(tokens, ANSWER)
        cold, hit = engine.complete(tokens), engine.complete(tokens)
        assert (cold.matched, hit.matched) == (0, 288)
        assert cold.tokens == hit.tokens == expected
        told = engine.http.get("/experts").json()
        assert (told["placed"], told["hot"]) == (True, 6)
        assert 0 < told["device_share"] < 1
    assert "decode steps of 1 rows are replayed" in log.read_text()


def test_a_request_may_have_all_pages_but_the_one_for_rows_that_pad(engine: EngineProcess) -> None:
    """More could never be had: it would wait for ever."""
    tokens, room = prompt(LENGTH, 5) * 6, (PAGES - 1) * 16
    body = {"model": engine.model_name, "prompt": tokens[: room - 7], "max_tokens": 8}
    answer = engine.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert str(room) in answer.text

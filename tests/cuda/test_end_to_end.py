"""`kvc2 serve` and `kvc2-engine serve`, real processes, with the hostile driver between them: the
engine's pool is a device's memory, and a worker moves its pages. Greedy output is token for token
what an engine without a cache says, wherever the prefix comes from and whoever has died; `make
cuda-check` is told when each first token came, and when each layer was told (moments)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from engine.settings import EngineConfig
from tests.cuda import hostile
from tests.cuda.moments import Timed, tell, timed
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess, loading_daemon
from tests.system.engine import EngineProcess, Truth, prompt, small_model, without_cache

PAGES = 160
LENGTH = 300  # of a prompt: 18 blocks, and 12 tokens more
FLAGS = ("--num-pages", str(PAGES), "--chunk-size", "64", "--max-running", "4")
WORDS = "seed=5,late_us=100"
CHECKED = "KVC2_DRIVER" in os.environ  # by `make cuda-check`
REAL = os.environ.get("KVC2_DRIVER") == "real"  # on a machine with a GPU
DEVICE = "cuda" if REAL else "cpu"
# So many layers that they are told one after the other, and pages of 32 KiB a layer
CHECKED_MODEL = {
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
    "initializer_range": 0.06,
}
LAYERS = 8 if CHECKED else 3
ROUNDS = 5 if CHECKED else 1
COMPUTED = "nowhere: all is computed"
DROPPED = {COMPUTED: (), "gpu": (), "cpu": ("gpu",), "disk": ("gpu", "cpu")}  # before each hit


@pytest.fixture(scope="module", autouse=True)
def driver() -> None:
    if REAL and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")


def environment() -> dict[str, str]:
    """Of daemon and engine."""
    return dict(os.environ) if REAL else hostile.environment(WORDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"), **(CHECKED_MODEL if CHECKED else {}))


@pytest.fixture(scope="module")
def truth(model: Path) -> Iterator[Truth]:
    with without_cache(
        EngineConfig(model, num_pages=PAGES, chunk_size=64, threads=1, device=DEVICE)
    ) as answer:
        yield answer


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    with loading_daemon(folder, environment=environment()) as process:
        yield process


def started(model: Path, daemon: DaemonProcess, log: Path) -> EngineProcess:
    return EngineProcess(
        model,
        log,
        "--kvc2",
        daemon.address,
        *(*FLAGS, "--device", DEVICE),
        python=("-m", "engine" if REAL else "tests.cuda.engine_on_hostile"),
        environment=environment(),
    )


@pytest.fixture
def engine(model: Path, daemon: DaemonProcess, tmp_path: Path) -> Iterator[EngineProcess]:
    with started(model, daemon, tmp_path / "log") as process:
        warm_up(process)
        yield process


def warm_up(engine: EngineProcess) -> None:
    """What is made at a first call is no part of a first token's time."""
    engine.wait_attached()
    engine.complete(prompt(40, 99))


def served(engine: EngineProcess, tokens: list[int], expected: list[int]) -> Timed:
    """A hit of all 18 blocks, of which each layer was told, unless nothing was copied."""
    found = timed(engine, tokens)
    assert (found.answer.matched, found.answer.tokens) == (288, expected)
    copied = found.answer.tiers["gpu"] < 288
    assert len(found.layers_ms) == (LAYERS if copied else 0)
    assert list(found.layers_ms) == sorted(found.layers_ms)
    return found


def test_the_daemon_says_what_it_found(daemon: DaemonProcess) -> None:
    wait_until(lambda: " cuda " in daemon.log.read_text())
    (line,) = [each for each in daemon.log.read_text().splitlines() if " cuda " in each]
    assert ("GPU-" if REAL else "hostile driver") in line


def test_hits_of_every_tier_are_equal_to_no_cache(
    engine: EngineProcess, daemon: DaemonProcess, truth: Truth
) -> None:
    found: dict[str, list[Timed]] = {name: [] for name in DROPPED}
    for seed in range(ROUNDS):
        tokens = prompt(LENGTH, 10 + seed)
        expected = truth(tokens)
        for name, tiers in DROPPED.items():
            if tiers:
                daemon.empty(*tiers)
            if name == COMPUTED:
                found[name].append(timed(engine, tokens))
                assert found[name][-1].answer.tokens == expected
                assert (found[name][-1].answer.matched, found[name][-1].layers_ms) == (0, ())
            else:
                found[name].append(served(engine, tokens, expected))
                assert found[name][-1].answer.tiers[name] == 288
    for name, runs in found.items():
        tell(name, runs)


def processes(daemon: DaemonProcess) -> tuple[psutil.Process, list[psutil.Process]]:
    """The nursery and the workers of a daemon."""
    (nursery,) = psutil.Process(daemon.pid).children()
    return nursery, nursery.children()


def test_a_killed_worker_costs_a_session_and_no_answer(
    engine: EngineProcess, daemon: DaemonProcess, truth: Truth
) -> None:
    tokens = prompt(LENGTH, 2)
    assert engine.complete(tokens).tokens == truth(tokens)
    daemon.make_durable()
    _, (worker,) = processes(daemon)
    worker.kill()
    wait_until(lambda: processes(daemon)[1] not in ([], [worker]))  # the engine attached again
    engine.wait_attached()
    tell("its worker was killed", [served(engine, tokens, truth(tokens))])


def test_what_a_killed_engine_left_on_the_device_is_served_to_the_next(
    model: Path, daemon: DaemonProcess, truth: Truth, tmp_path: Path
) -> None:
    """It was rescued from memory whose maker is dead."""
    tokens = prompt(LENGTH, 3)
    with started(model, daemon, tmp_path / "first") as first:
        first.wait_attached()
        assert first.complete(tokens).tokens == truth(tokens)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    wait_until(lambda: not daemon.admin().stats().sessions)
    with started(model, daemon, tmp_path / "second") as second:
        warm_up(second)
        tell("its engine was killed", [served(second, tokens, truth(tokens))])


def test_an_engine_outlives_its_daemon_and_attaches_to_the_next(
    engine: EngineProcess, daemon: DaemonProcess, truth: Truth
) -> None:
    tokens = prompt(LENGTH, 4)
    assert engine.complete(tokens).tokens == truth(tokens)
    daemon.make_durable()
    nursery, workers = processes(daemon)
    daemon.kill()
    wait_until(lambda: not any(psutil.pid_exists(each.pid) for each in (nursery, *workers)))
    assert engine.complete(tokens).tokens == truth(tokens)
    daemon.start()
    engine.wait_attached()
    found = served(engine, tokens, truth(tokens))
    assert found.answer.tiers["disk"] == 288
    tell("its daemon was killed", [found])


def test_without_a_driver_the_daemon_says_so_and_refuses_devices_by_name(
    model: Path, tmp_path: Path, truth: Truth
) -> None:
    if CHECKED:
        pytest.skip("the check finds a driver wherever it looks, a real or the hostile one")
    with DaemonProcess(tmp_path) as daemon:
        wait_until(lambda: " cuda " in daemon.log.read_text())
        assert "libcuda.so.1" in daemon.log.read_text()
        wait_until(lambda: not psutil.Process(daemon.pid).children())  # nobody needs them
        with started(model, daemon, tmp_path / "engine") as engine:
            tokens = prompt(LENGTH, 5)
            assert engine.complete(tokens).tokens == truth(tokens)  # it goes on without
            wait_until(lambda: "found no CUDA device" in (tmp_path / "engine").read_text())
    assert "LD_LIBRARY_PATH" not in os.environ or "hostile" not in os.environ["LD_LIBRARY_PATH"]

"""vLLM on the CPU behind our connector, as processes: killed, restarted, without a daemon. Every
answer is that of a vLLM without a connector, in float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks.connectors import Completion, Vllm, behind_kvc2
from benchmarks.processes import Daemon, ProcessError
from engine import demo_model
from tests.peers.environments import vllm_python

pytestmark = pytest.mark.peers
SHARED, OWN = 512, 40  # tokens: four blocks of vLLM on the CPU, and what is computed
LOADS = ("--load-policy", "always")  # also what is late on a busy machine, which is computed else
RANDOM = np.random.default_rng(1)
PROMPTS = [RANDOM.integers(100, 40_000, SHARED + OWN).tolist() for _ in range(3)]


def after(prompt: list[int], number: int) -> list[int]:
    """Another prompt with the same first tokens."""
    return prompt[:SHARED] + PROMPTS[(number + 1) % len(PROMPTS)][SHARED:]


class Setting:
    """A daemon with a disk and the processes of vLLM that a test starts."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._python = vllm_python()
        self._model = demo_model.build(demo_model.default_directory())
        self.expected = self._computed()
        self.daemon = self.new_daemon()

    def new_daemon(self) -> Daemon:
        self.daemon = Daemon(self._folder, cpu_gb=1.0, disk_gb=2.0, flags=LOADS)
        self._stack.callback(self.daemon.stop)
        self.daemon.wait_ready()
        return self.daemon

    def vllm(self, name: str, *, attached: bool = True) -> Vllm:
        transfer = behind_kvc2(f"unix:{self._folder / 'kvc2.sock'}") if attached else None
        folder, model = self._folder, self._model
        made = Vllm(name, self._python, model, folder, transfer=transfer, dtype="float32")
        self._stack.callback(made.stop)
        made.wait_ready()
        return made

    def _computed(self) -> list[tuple[Completion, Completion]]:
        alone = self.vllm("alone", attached=False)
        found = []
        for number, prompt in enumerate(PROMPTS):
            first = alone.complete(prompt)
            alone.forget()
            found.append((first, alone.complete(after(prompt, number))))
            alone.forget()
        alone.stop()
        return found

    def ask(self, vllm: Vllm, number: int, *, cached: int, again: bool = False) -> None:
        """A prompt, or another with its first tokens: as expected, `cached` tokens not computed."""
        prompt = after(PROMPTS[number], number) if again else PROMPTS[number]
        answer = vllm.complete(prompt)
        assert answer.tokens == self.expected[number][again].tokens
        assert answer.cached_tokens == cached


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with ExitStack() as stack:
        yield Setting(tmp_path_factory.mktemp("vllm"), stack)


@pytest.mark.timeout(1800)
def test_answers_stay_equal_over_tiers_deaths_and_restarts(setting: Setting) -> None:
    first = setting.vllm("first")
    setting.ask(first, 0, cached=0)
    first.forget()
    setting.ask(first, 0, cached=SHARED, again=True)  # from memory
    setting.daemon.flush()
    setting.daemon.evict("cpu")
    first.forget()
    setting.ask(first, 0, cached=SHARED, again=True)  # from the disk

    lost = threading.Thread(target=_lost, args=(first, PROMPTS[1]))
    lost.start()
    first.kill()  # in the middle of a request
    lost.join()
    second = setting.vllm("second")
    setting.ask(second, 0, cached=SHARED, again=True)
    setting.daemon.wait_sessions(1)

    setting.daemon.kill()
    setting.ask(second, 2, cached=0)  # without a daemon
    setting.new_daemon()
    setting.daemon.wait_sessions(1)
    second.forget()
    setting.ask(second, 0, cached=SHARED, again=True)  # from the disk of the daemon that died


def _lost(vllm: Vllm, prompt: list[int]) -> None:
    with pytest.raises(ProcessError):
        vllm.complete(prompt, 512)

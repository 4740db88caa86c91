"""Whole engines for step.py: prompts are prefilled, then decode steps are timed one by one.

transformers in this process, with a DynamicCache; vllm in a process and an environment of its own
(vllm_step.py), compiled as it ships or eager. Both greedy, in bf16, without prefix caching.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.disk_peers import UNWANTED, VLLM, Unavailable, environment

DRIVER = Path(__file__).with_name("vllm_step.py")
NAMES = ("transformers", "vllm")

Prompt = list[int]


class Peer(Protocol):
    """Seconds of what it is told to do."""

    def start(self, prompts: list[Prompt]) -> None:
        """Prefills the prompts; their requests then decode together."""

    def steps(self, count: int) -> list[float]:
        """Of each of so many decode steps of all that were started."""

    def end(self) -> None:
        """Drops what was started."""

    def prefill(self, prompt: Prompt) -> float:
        """To the first token, with nothing cached."""


class Transformers:
    """A model of transformers; torch has `threads` while it computes."""

    def __init__(self, model: Path, threads: int) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self._threads = threads
        self._cache: Any = None
        self._next = torch.empty(0)

    def start(self, prompts: list[Prompt]) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self._forward(torch.tensor(prompts))

    def steps(self, count: int) -> list[float]:
        return [self._forward(self._next) for _ in range(count)]

    def end(self) -> None:
        self._cache = None

    def prefill(self, prompt: Prompt) -> float:
        from transformers import DynamicCache

        self._cache = DynamicCache()
        return self._forward(torch.tensor([prompt]))

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        begin = time.perf_counter()
        done = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next = done.logits[:, -1].argmax(-1, keepdim=True)
        seconds = time.perf_counter() - begin
        torch.set_num_threads(before)
        return seconds


class Vllm:
    """vllm_step.py as a child. Raises Unavailable if it doesn't start."""

    def __init__(self, model: Path, venv: Path, log: Path, *, max_tokens: int, eager: bool) -> None:
        python = environment(venv, VLLM, UNWANTED)
        extra = {"VLLM_CPU_KVCACHE_SPACE": "4", "STEP_EAGER": "1" if eager else ""}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                [str(python), str(DRIVER), str(model), str(max_tokens)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **extra},
            )
        self._log = log
        self._read()

    def start(self, prompts: list[Prompt]) -> None:
        self._ask(start=prompts)

    def steps(self, count: int) -> list[float]:
        seconds: list[float] = self._ask(steps=count)
        return seconds

    def end(self) -> None:
        self._ask(end=True)

    def prefill(self, prompt: Prompt) -> float:
        return float(self._ask(prefill=prompt))

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def _ask(self, **command: Any) -> Any:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(command) + "\n")
        self._child.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-3:]
            raise Unavailable(f"vllm ended: {' '.join(tail)}")
        return json.loads(line)

"""Starts `kvc2-engine serve` as a real process, the model directory that it serves, and what an
engine without a cache answers."""

from __future__ import annotations

import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx
from fastapi.testclient import TestClient
from openai import OpenAI

from engine.serve import assemble
from engine.settings import EngineConfig
from tests.doubles.byte_tokenizer import VOCAB_SIZE, add_tokenizer
from tests.doubles.checkpoints import make_mixtral

START_S = 60.0


class Truth(Protocol):
    """The tokens of a greedy answer."""

    def __call__(self, tokens: list[int], max_tokens: int = 8, /) -> list[int]: ...


def prompt(length: int, seed: int) -> list[int]:
    """Tokens of the small model, none of them special."""
    return random.Random(seed).choices(range(3, 259), k=length)


def small_model(model_dir: Path, **fields: Any) -> Path:
    """A Mixtral of 3 layers in fp32 with a byte-level tokenizer and 2,048 tokens of context."""
    defaults = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 2048}
    return add_tokenizer(make_mixtral(model_dir, **(defaults | fields)))


def greedy(model: str, prompt: list[int] | str, max_tokens: int) -> dict[str, Any]:
    """The body of a completion of so many tokens, answered with its details."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "kvc2": {"details": True},
    }


@contextmanager
def without_cache(config: EngineConfig) -> Iterator[Truth]:
    """What an engine in this process answers that has no daemon."""
    engine = assemble(config)
    with TestClient(engine.app) as client:

        def answer(tokens: list[int], max_tokens: int = 8) -> list[int]:
            body = greedy(config.model.name, tokens, max_tokens)
            return Answer(client.post("/v1/completions", json=body).json()).tokens

        yield answer
    engine.bridge.close()


class EngineProcess:
    """A running engine; killed at the end of a `with`. Standard error goes to `log`. `python`: what
    the interpreter is told to run."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *flags: str,
        python: Sequence[str] = ("-m", "engine"),
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.log = log
        command = [sys.executable, *python, "serve", "--model", str(model), "--port", "0"]
        environment = {**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("ab") as error:
            self.process = subprocess.Popen(
                [*command, "--threads", "1", *flags],
                stdout=subprocess.PIPE,
                stderr=error,
                env=environment,
                text=True,
            )
        self.url = self._address()
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _address(self) -> str:
        lines: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None
        stdout = self.process.stdout

        def read() -> None:  # an editable install may first say that it rebuilds
            lines.put(next((line for line in stdout if line.startswith("serving ")), ""))

        threading.Thread(target=read, daemon=True).start()
        try:
            line = lines.get(timeout=START_S)
        except queue.Empty:
            line = ""
        if not line:
            self.process.kill()
            raise AssertionError(f"the engine didn't start: {self.log.read_text()[-2000:]}")
        return line.split()[-1]

    def wait_attached(self, attached: bool = True, timeout_s: float = 15.0) -> None:
        self.wait_until(lambda: self.http.get("/health").json()["attached"] is attached, timeout_s)

    def wait_until(self, condition: Any, timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"in vain: {self.log.read_text()[-2000:]}"
            time.sleep(0.02)

    def complete(self, prompt: list[int] | str, max_tokens: int = 8, **fields: Any) -> Answer:
        """A greedy answer with its details."""
        body = greedy(self.model_name, prompt, max_tokens) | fields
        reply = self.http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        return Answer(reply.json())

    @property
    def model_name(self) -> str:
        return str(self.http.get("/v1/models").json()["data"][0]["id"])

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 when it is not there yet."""
        wanted = name + (
            "{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}" if labels else ""
        )
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(wanted + " "):
                return float(line.split()[-1])
        return 0.0

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(20)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Answer:
    """A completion and what it cost."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.details: dict[str, Any] = body["kvc2"]
        self.tokens: list[int] = [t["token_id"] for t in self.details["tokens"]]
        self.matched: int = self.details["matched_tokens"]
        self.tiers: dict[str, int] = self.details["tiers"]

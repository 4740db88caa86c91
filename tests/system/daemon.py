"""`kvc2 serve` as a real process, and a tiny engine as another: started, killed, frozen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kvc2.client import Admin
from kvc2.client.channel import Channel, probe
from kvc2.host.address import Address
from tests.doubles.standing_still import CanStandStill
from tests.doubles.waiting import wait_until

START_S = 20.0
STOP_S = 20.0
SMALL = ("--cpu-memory-size-gb", "0.016", "--slab-bytes", "1048576")


class DaemonProcess(CanStandStill):
    """`with DaemonProcess(folder) as daemon:` listens at `daemon.address` and is killed at the end.

    Its stderr goes to folder/daemon.log. `start` after `kill` or `stop` starts it again there.
    `python` is what the interpreter is told to run, by a command that `before` begins.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        sizes: Sequence[str] = SMALL,
        python: Sequence[str] = ("-m", "kvc2"),
        environment: Mapping[str, str] = os.environ,
        before: Sequence[str] = (),
    ) -> None:
        self._before = before
        self._python = python
        self._environment = environment
        self.folder = folder
        self.address = f"unix:{folder / 'kvc2.sock'}"
        self.log = folder / "daemon.log"
        self._flags = (*sizes, "--listen", self.address, *flags)
        self._process: subprocess.Popen[bytes] | None = None
        self.start_s = 0.0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when its health service says SERVING."""
        started = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._before, sys.executable, *self._python, "serve", *self._flags],
                stderr=log,
                env=self._environment,
            )
        while not self.serves():
            if self._process.poll() is not None:
                raise AssertionError(f"exit code {self._process.returncode}: {self.tail()}")
            if time.monotonic() - started > START_S:
                raise AssertionError(f"not serving after {START_S} s: {self.tail()}")
            time.sleep(0.01)
        self.start_s = time.monotonic() - started

    def serves(self) -> bool:
        place = Address.of_daemon(self.address)
        if not probe(place):
            return False
        channel = Channel(place)
        try:
            return channel.serves(1.0)
        finally:
            channel.close()

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_S)

    def tail(self) -> str:
        return self.log.read_text()[-2000:]

    def admin(self) -> Admin:
        return Admin(self.address)

    def make_durable(self) -> None:
        """All that was answered is on the disk. What an answer's end commits and releases may come
        after the answer: that is waited for."""
        wait_until(lambda: not self.admin().stats().leases)
        assert not any(self.admin().flush(20).not_durable_blocks.values())

    def empty(self, *tiers: str) -> None:
        """Makes all durable, then drops what these tiers hold."""
        self.make_durable()
        for tier in tiers:
            self.admin().evict(tier)

    def __enter__(self) -> DaemonProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def loading_daemon(folder: Path, environment: Mapping[str, str] = os.environ) -> DaemonProcess:
    """With a disk, and every hit is one: also where a tier is slower than a small model, which a
    busy machine makes likely."""
    disk = ("--disk-path", str(folder / "disk"), "--disk-size-gb", "0.2")
    loads = ("--load-policy", "always", "--acquire-deadline-ms", "20000")
    return DaemonProcess(folder, *disk, *loads, environment=environment)


class EngineProcess(CanStandStill):
    """tests/system/tiny_engine.py: takes commands as JSON lines and answers each with one. So does
    arena_reader.py, which takes more `arguments`."""

    def __init__(self, address: str, *arguments: str, program: str = "tiny_engine") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.system.{program}", address, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        return self.answer()

    def tell(self, **command: Any) -> None:
        self._pipe(self._process.stdin).write(json.dumps(command).encode() + b"\n")
        self._pipe(self._process.stdin).flush()

    def answer(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        assert line, "the engine ended"
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _pipe(self, pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()

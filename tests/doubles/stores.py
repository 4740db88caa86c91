"""Remote stores for tests: a real server in a process of its own, and one that is told what to
do."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import Buffer

from benchmarks.processes import NO_STORE, store_program
from kvc2.tiers.remote.store import Store, StoreError, StoreRefused
from tests.doubles.standing_still import CanStandStill
from tests.doubles.waiting import wait_until

START_S = 20.0


def server_program() -> str:
    """Skips where there is none."""
    return store_program() or pytest.skip(NO_STORE)


class ServerProcess(CanStandStill):
    """`with ServerProcess(folder) as server:` serves at `server.url`, a unix socket in the folder,
    keeps nothing on disk, and is killed at the end. `before` begins its command."""

    def __init__(self, folder: Path, *flags: str, before: Sequence[str] = ()) -> None:
        self.socket = folder / "store.sock"
        self.url = f"unix://{self.socket}"
        self._command = [
            *before,
            *(server_program(), "--port", "0", "--unixsocket", str(self.socket)),
            *("--save", "", "--appendonly", "no", "--dir", str(folder), *flags),
        ]
        self._log = folder / "store.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        try:
            wait_until(self._answers, START_S)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def call(self, *words: bytes) -> bytes:
        """The answer of one command, as it comes on the wire."""
        with socket.socket(socket.AF_UNIX) as wire:
            wire.settimeout(START_S)
            wire.connect(str(self.socket))
            parts = [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
            wire.sendall(b"*%d\r\n" % len(words) + b"".join(parts))
            answer = wire.recv(1 << 16)
            if answer[:1] != b"$" or answer[:2] == b"$-":
                return answer[1:].split(b"\r\n")[0]
            head, _, rest = answer.partition(b"\r\n")
            while len(rest) < int(head[1:]) + 2:
                rest += wire.recv(1 << 20)
            return rest[: int(head[1:])]

    def names(self) -> list[bytes]:
        """Of all that it holds."""
        with socket.socket(socket.AF_UNIX) as wire:
            wire.settimeout(START_S)
            wire.connect(str(self.socket))
            wire.sendall(b"*2\r\n$4\r\nKEYS\r\n$1\r\n*\r\n")
            reader = wire.makefile("rb")
            count = int(reader.readline()[1:])
            found = []
            for _ in range(count):
                size = int(reader.readline()[1:])
                found.append(reader.read(size + 2)[:-2])
            return sorted(found)

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise AssertionError(self._log.read_text()[-2000:])
        try:
            return self.call(b"PING")[:6] in (b"PONG", b"NOAUTH")
        except OSError:
            return False

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


class ToldStore:
    """A Store in memory. Tests change `values`, and what its calls do: `before` is awaited by each
    with its name, and may wait, raise StoreError, or change what is there."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.calls: list[str] = []
        self.before: Callable[[str], object] = lambda name: None
        self.hangs: set[str] = set()  # calls that are never answered
        self.fails: set[str] = set()
        self.refuses: set[str] = set()
        self.slow_s = 0.0

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        self.before(name)
        if name in self.hangs:
            await asyncio.Event().wait()
        if self.slow_s:
            await asyncio.sleep(self.slow_s)
        if name in self.fails:
            raise StoreError(f"{name} fails")
        if name in self.refuses:
            raise StoreRefused(f"{name} is refused")

    async def exists(self, names: Sequence[bytes]) -> list[bool]:
        await self._call("exists")
        return [name in self.values for name in names]

    async def get(self, names: Sequence[bytes], num_bytes: int) -> list[bytes | None]:
        await self._call("get")
        found = [self.values.get(name) for name in names]
        return [None if each is None else each[: num_bytes + 1] for each in found]

    async def put(self, values: Sequence[tuple[bytes, Buffer]], ttl_s: int) -> None:
        await self._call("put")
        self.values.update((name, bytes(value)) for name, value in values)

    async def delete(self, names: Sequence[bytes]) -> None:
        await self._call("delete")
        for name in names:
            self.values.pop(name, None)

    async def ping(self) -> None:
        await self._call("ping")

    async def close(self) -> None:
        self.calls.append("close")


async def holds_the_seam(store: Store) -> None:
    """A store that is empty does what a Store does, with large values and with many."""
    large = np.random.default_rng(1).bytes(5 << 20)
    await store.put([(b"a", b"one"), (b"b", large)], 0)
    assert await store.get([b"a", b"x", b"b"], len(large)) == [b"one", None, large]
    assert await store.get([b"b"], 4) == [large[:5]]
    await store.put([(b"a", b"another")], 0)
    assert await store.get([b"a"], 100) == [b"another"]
    assert await store.exists([b"a", b"x", b"b"]) == [True, False, True]
    await store.delete([b"a", b"x"])
    assert await store.get([b"a", b"b"], len(large)) == [None, large]
    many = [(b"%d" % each, bytes([each % 256]) * 1000) for each in range(500)]
    await store.put(many, 0)
    assert await store.get([name for name, _ in many], 1000) == [value for _, value in many]

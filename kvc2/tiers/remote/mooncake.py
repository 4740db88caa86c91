"""Mooncake Store behind the seam, by its own client in a process that can be killed.

    link.py ──call──► Mooncake ──line of JSON──► mooncake_child.py ──► its master, and the nodes
                          └────── values ──────── memory of both

Its client has no deadlines: it has been seen to block for 30 s on a frozen node, and nothing ends
such a call from inside. So a call that is not answered within the deadline ends the process, with
all others in it, and the next one begins another. Not here: when the store is asked (link.py).
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
import subprocess
import sys
from bisect import insort
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Buffer

from kvc2.host.store_url import MooncakeUrl
from kvc2.tiers.remote.store import StoreError, StoreRefused, StoreUnable

CHILD = Path(__file__).with_name("mooncake_child.py")
MEMORY_BYTES = 256 << 20  # of values under way; what is not used takes none
PROBE_BYTES = 4096  # of it are the child's own
SETUP_S = 20.0
LINE_BYTES_MAX = 1 << 24
ALIGNMENT = 64
Span = tuple[int, int]  # offset and bytes


class Room:
    """Spans of `num_bytes`, first come, first served."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._taken: list[tuple[int, int]] = []  # (begin, end), in order
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    async def take(self, num_bytes: int) -> int:
        """Where a span of at most `self.num_bytes` begins; waits until there is one."""
        async with self._turn:
            while (begin := self._find(num_bytes)) is None:
                self._freed.clear()
                await self._freed.wait()
            insort(self._taken, (begin, begin + num_bytes))
            return begin

    def free(self, begin: int) -> None:
        self._taken = [each for each in self._taken if each[0] != begin]
        self._freed.set()

    def _find(self, num_bytes: int) -> int | None:
        at = 0
        for begin, end in self._taken:
            if begin - at >= num_bytes:
                return at
            at = end
        return at if self.num_bytes - at >= num_bytes else None


@dataclass
class Part:
    begin: int
    call: asyncio.Future[list[int]] | None = None  # that it is used by


class Child:
    """
    | state    | to    | when [function]                                               |
    |----------|-------|---------------------------------------------------------------|
    | begins   | ready | it says so [_hear]                                             |
    | begins   | over  | it says why not, ends, or takes longer than SETUP_S [_end]     |
    | ready    | over  | a call is not answered in time, it ends, or is ended [_end]    |

    `why` it is over, or not ready yet."""

    def __init__(self, spec: str, deadline_s: float) -> None:
        self.ready, self.over, self.why = False, False, "its client begins"
        self._deadline_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._last, self._calls = 0, dict[int, asyncio.Future[list[int]]]()
        self.room = Room(MEMORY_BYTES - PROBE_BYTES)
        fd = os.memfd_create("kvc2-mooncake", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        try:
            os.ftruncate(fd, MEMORY_BYTES)
            self.memory = memoryview(mmap.mmap(fd, MEMORY_BYTES))
            given = (str(theirs.fileno()), str(fd), str(MEMORY_BYTES), spec)
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), *given],
                pass_fds=(theirs.fileno(), fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(fd)
        self._hearing = asyncio.create_task(self._hear(ours))
        self._calls[0] = begun = self._loop.create_future()
        self._bound(begun, SETUP_S, "begin")
        begun.add_done_callback(self._begun)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(
        self,
        name: str,
        names: Sequence[bytes],
        spans: Sequence[Span] = (),
        part: Part | None = None,
    ) -> list[int]:
        """Its answer, a number for each name; `spans` are of `part`. Raises StoreError."""
        if self.over or not self.ready:
            raise StoreError(self.why)
        self._last += 1
        self._calls[self._last] = answer = self._loop.create_future()
        if part is not None:
            part.call = answer
        self._bound(answer, self._deadline_s, name)
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        asked = {
            "id": self._last,
            "call": name,
            "names": [each.decode("latin-1") for each in names],
        }
        self._writer.write(json.dumps({**asked, "spans": list(spans)}).encode() + b"\n")
        found: list[int] = await asyncio.shield(answer)  # who goes away ends nothing in the child
        if len(found) != len(names):
            raise StoreError(f"{name}: {len(found)} answers for {len(names)} names")
        return found

    @asynccontextmanager
    async def part(self, num_bytes: int) -> AsyncIterator[Part]:
        """Of the memory, for one call. If the caller goes away before the child has answered, it is
        nobody's until then."""
        part = Part(await self.room.take(num_bytes))
        try:
            yield part
        finally:
            if part.call is None or part.call.done():
                self.room.free(part.begin)
            else:
                part.call.add_done_callback(lambda _: self.room.free(part.begin))

    async def end(self) -> None:
        """When its process has gone."""
        self._end("its client is ended")
        with suppress(asyncio.CancelledError):
            await self._hearing
        await asyncio.to_thread(self._process.wait)

    def _bound(self, call: asyncio.Future[list[int]], seconds: float, name: str) -> None:
        late = f"{name}: no answer within {seconds:g} s: its client is killed"
        timer = self._loop.call_later(seconds, self._end, late)
        call.add_done_callback(lambda _: timer.cancel())

    def _begun(self, call: asyncio.Future[list[int]]) -> None:
        if call.exception() is not None:
            self._end(str(call.exception()))
        else:
            self.ready = True

    def _end(self, why: str) -> None:
        if self.over:
            return
        self.over, self.why = True, why
        self._process.kill()  # whatever it is in the middle of
        self._hearing.cancel()
        for call in list(self._calls.values()):
            if not call.done():
                call.set_exception(StoreError(why))
        self._calls.clear()
        # its parent must ask for its end, or it stays in the table of processes
        self._loop.run_in_executor(None, self._process.wait)

    async def _hear(self, wire: socket.socket) -> None:
        reader, self._writer = await asyncio.open_connection(sock=wire, limit=LINE_BYTES_MAX)
        try:
            while line := await reader.readline():
                self._take(json.loads(line))
            self._end("its client has ended")
        except (OSError, ValueError, LookupError, TypeError) as error:
            self._end(f"its client says what can't be read: {error!r}")
        finally:
            self._writer.close()

    def _take(self, told: dict[str, Any]) -> None:
        call = self._calls.pop(told["id"])
        if call.done():
            return
        if "error" in told:
            kind = StoreRefused if told["refused"] else StoreError
            call.set_exception(kind(told["error"]))
        else:
            call.set_result(told["ok"])


class Mooncake:
    """A Store. It can't let go of a value after a time."""

    def __init__(self, url: MooncakeUrl, deadline_s: float) -> None:
        self._url, self._deadline_s = url, deadline_s
        self._child: Child | None = None

    async def exists(self, names: Sequence[bytes]) -> list[bool]:
        return [each > 0 for each in await self._ready().call("exists", names)]

    async def get(self, names: Sequence[bytes], num_bytes: int) -> list[bytes | None]:
        size, child, found = num_bytes + 1, self._ready(), list[bytes | None]()
        stride = aligned(size)
        for part in self._parts(names, [stride] * len(names), child):
            async with child.part(stride * len(part)) as at:
                starts = [at.begin + stride * each for each in range(len(part))]
                lengths = await child.call("get", part, [(each, size) for each in starts], at)
                found += [
                    None if length < 1 else bytes(child.memory[start : start + min(length, size)])
                    for start, length in zip(starts, lengths, strict=True)
                ]
        return found

    async def put(self, values: Sequence[tuple[bytes, Buffer]], ttl_s: int) -> None:
        if ttl_s:
            raise StoreUnable("Mooncake keeps no time: what has a time to live is not put")
        child, views = self._ready(), dict[bytes, memoryview]()
        for name, value in values:
            views[name] = memoryview(value).cast("B")
        sizes = [aligned(each.nbytes) for each in views.values()]
        for part in self._parts(list(views), sizes, child):
            async with child.part(sum(aligned(views[name].nbytes) for name in part)) as at:
                start, spans = at.begin, list[Span]()
                for name in part:
                    view = views[name]
                    child.memory[start : start + view.nbytes] = view
                    spans.append((start, view.nbytes))
                    start += aligned(view.nbytes)
                await child.call("put", part, spans, at)

    async def delete(self, names: Sequence[bytes]) -> None:
        await self._ready().call("delete", names)

    async def ping(self) -> None:
        await self._ready().call("ping", ())

    async def close(self) -> None:
        if self._child is not None:
            await self._child.end()

    def _ready(self) -> Child:
        """Raises StoreError while it begins: that takes longer than anybody waits."""
        if self._child is None or self._child.over:
            before = None if self._child is None else self._child.why
            try:
                self._child = Child(self._url.spec, self._deadline_s)
            except OSError as error:
                raise StoreError(f"its client can't be started: {error}") from error
            if before:
                self._child.why += f"; before: {before}"
        if not self._child.ready:
            raise StoreError(self._child.why)
        return self._child

    @staticmethod
    def _parts(names: Sequence[bytes], sizes: Sequence[int], child: Child) -> list[list[bytes]]:
        """So many names at a time as there is room for. Raises StoreUnable."""
        parts, left = list[list[bytes]](), 0
        for name, size in zip(names, sizes, strict=True):
            if size > child.room.num_bytes:
                raise StoreUnable(f"a value of {size} bytes: {child.room.num_bytes} at most")
            if size > left:
                parts.append([])
                left = child.room.num_bytes
            parts[-1].append(name)
            left -= size
        return parts


def aligned(num_bytes: int) -> int:
    """A span of at least so much."""
    return max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT

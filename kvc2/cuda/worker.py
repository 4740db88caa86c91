"""The process that calls CUDA for the daemon: one for each device in use, forked by the nursery.

    main thread        opens and closes pools
    promoting thread   arena -> pools     each with a channel, a context made current, a stream
    demoting thread    pools -> arena

It holds no state that a new one would not get told again, so that it may be killed at any moment:
it is, when a call of it takes too long and after any fault that poisons its context. Not here: how
it begins (nursery.py), who calls it (workers.py).
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvc2.cuda.driver import Gpu
from kvc2.cuda.faults import CudaFault
from kvc2.cuda.memory import Registered, opened
from kvc2.cuda.messages import Channel, Message, Outcome, Pages, PoolShape, What
from kvc2.cuda.mover import DevicePages, Mover
from kvc2.cuda.rows import groups

PROGRESS_BYTES = 4096


@dataclass(frozen=True)
class WorkerChannels:
    """Of one worker: for its pools, and for each way of its copies."""

    pools: Channel
    promoting: Channel
    demoting: Channel


class Progress:
    """Where one engine is told how far a promotion is: a word in a page, and an eventfd."""

    def __init__(self, page_fd: int, event_fd: int) -> None:
        self._word = np.frombuffer(mmap.mmap(page_fd, PROGRESS_BYTES), "<u8", 1)
        self._event_fd = os.dup(event_fd)

    def tell(self, word: int) -> None:
        """The store is one instruction; the kernel's call after it publishes it."""
        self._word[0] = word
        os.eventfd_write(self._event_fd, 1)

    def close(self) -> None:
        os.close(self._event_fd)


@dataclass(frozen=True)
class OpenPool:
    pages: DevicePages
    progress: Progress


class Worker:
    """All pools of one device. `uuid` names it; it is opened with the first pool."""

    def __init__(self, uuid: str, arena: NDArray[np.uint8], piece: int) -> None:
        self._uuid = uuid
        self._arena = Registered(arena, piece)
        self._pools: dict[int, OpenPool] = {}
        self._gpu: Gpu | None = None

    def run(self, channels: WorkerChannels) -> None:
        """Until the daemon closes its end."""
        ways = ((channels.promoting, self._promote), (channels.demoting, self._read))
        for channel, serve in ways:
            moving = threading.Thread(target=self._move, args=(channel, serve), daemon=True)
            moving.start()
        self._serve(channels.pools, self._change)

    def _serve(self, channel: Channel, do: Callable[[Message], None]) -> None:
        while (message := channel.receive()) is not None:
            with message:
                channel.answer(*self._outcome(do, message))

    def _outcome(self, do: Callable[[Message], None], message: Message) -> tuple[Outcome, str]:
        try:
            do(message)
        except CudaFault as fault:
            return (Outcome.LOST if fault.sticky else Outcome.REFUSED), str(fault)
        except (LookupError, ValueError, RuntimeError, OSError) as error:
            return Outcome.REFUSED, f"{type(error).__name__}: {error}"
        return Outcome.DONE, ""

    # ---- pools

    def _change(self, message: Message) -> None:
        if message.what is What.OPEN:
            self._open(message)
        elif message.what is What.CLOSE:
            gone = self._pools.pop(message.pool)
            gone.pages.memory.close()
            gone.progress.close()
        else:
            raise ValueError(f"{message.what!r} on the channel of pools")

    def _open(self, message: Message) -> None:
        if self._gpu is None:
            self._gpu = Gpu.of_uuid(self._uuid)
        shape = PoolShape.of(message.body)
        memory_fd, page_fd, event_fd = message.fds
        rows = groups(shape.segments, shape.layer_ends, self._gpu.max_pitch)
        memory = opened(self._gpu, memory_fd, shape.memory_bytes)
        progress = Progress(page_fd, event_fd)
        self._pools[message.pool] = OpenPool(DevicePages(memory, rows), progress)

    # ---- copies, each way on a thread of its own

    def _move(self, channel: Channel, do: Callable[[Mover, OpenPool, Message], None]) -> None:
        """A pool is opened before anything is copied, so that the device is."""
        mover: Mover | None = None

        def move(message: Message) -> None:
            nonlocal mover
            pool = self._pools[message.pool]
            if mover is None:
                mover = self._mover()
            do(mover, pool, message)

        self._serve(channel, move)

    def _mover(self) -> Mover:
        if self._gpu is None:
            raise ValueError("no device was opened")
        self._gpu.use()
        return Mover(self._gpu, self._arena)

    def _promote(self, mover: Mover, pool: OpenPool, message: Message) -> None:
        moved, base = Pages.of(message.body), message.base

        def tell(layers: int) -> None:
            pool.progress.tell(base + layers)

        mover.write(pool.pages, moved.pages, moved.payloads, tell if base else None)

    def _read(self, mover: Mover, pool: OpenPool, message: Message) -> None:
        moved = Pages.of(message.body)
        mover.read(pool.pages, moved.pages, moved.payloads)

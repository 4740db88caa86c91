"""The daemon's side of its workers: calls with a deadline, and the death of one that fails.

    starting -> serving [forked]     serving -> dead [killed: it was late, poisoned or not wanted;
                                                      or it died by itself]
A dead one is followed by another as soon as somebody asks. Not here: which pools a worker has
(tiers/device.py), what it does (worker.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Sequence

from kvc2.cuda.faults import NoWorker, RefusedByWorker, WorkerLost
from kvc2.cuda.messages import Channel, Message, Outcome, What
from kvc2.cuda.nursery import Nursery

RETIRED_MAX = 4  # a call to one that died earlier than these has ended long ago
GONE_S = 5.0  # for a killed process to be gone: its memory is unmapped by then


class WorkerProcess:
    """One worker, as the daemon sees it. Threads may share it: pools, promotions and demotions wait
    for one another only among themselves."""

    def __init__(self, uuid: str, ends: Sequence[socket.socket], pidfd: int) -> None:
        """Takes the descriptors over."""
        pools, promoting, demoting = (Channel(each) for each in ends)
        self.uuid = uuid
        self.pidfd = pidfd
        self._channels = {
            What.OPEN: pools,
            What.CLOSE: pools,
            What.WRITE: promoting,
            What.READ: demoting,
        }

    @property
    def dead(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def call(self, message: Message, timeout_s: float) -> None:
        """Raises RefusedByWorker with what it said; WorkerLost when it said nothing in time, or can
        do nothing more: it is dead then."""
        try:
            outcome, text = self._channels[message.what].call(message, timeout_s)
        except OSError as error:
            outcome, text = Outcome.LOST, str(error) or repr(error)
        if outcome is Outcome.LOST:
            self.kill()
            raise WorkerLost(f"{message.what.name} on {self.uuid}: {text}")
        if outcome is Outcome.REFUSED:
            raise RefusedByWorker(text)

    def kill(self) -> None:
        """Returns when it is gone, and with it all that it had mapped and queued. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        select.select([self.pidfd], [], [], GONE_S)

    def close(self) -> None:
        """Nobody calls it any more."""
        self.kill()
        for each in set(self._channels.values()):
            each.close()
        os.close(self.pidfd)


class Workers:
    """One worker for each device in use, started with its first pool. Threads may share it."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._lock = threading.Lock()
        self._by_uuid: dict[str, WorkerProcess] = {}
        self._retired: list[WorkerProcess] = []  # dead; a call may still hold one
        self._closed = False

    def of(self, uuid: str) -> WorkerProcess:
        """The device's, a new one where the last has died. Raises NoWorker."""
        with self._lock:
            if self._closed:
                raise NoWorker("the daemon stops")
            there = self._by_uuid.get(uuid)
            if there is not None and not there.dead:
                return there
            if there is not None:
                self._retired.append(self._by_uuid.pop(uuid))
            while len(self._retired) > RETIRED_MAX:
                self._retired.pop(0).close()
            self._by_uuid[uuid] = WorkerProcess(uuid, *self._nursery.start(uuid))
            return self._by_uuid[uuid]

    def close(self) -> None:
        """No call may be under way, or follow."""
        with self._lock:
            self._closed = True
            for each in (*self._by_uuid.values(), *self._retired):
                each.close()
            self._by_uuid.clear()
            self._retired.clear()
        self._nursery.close()

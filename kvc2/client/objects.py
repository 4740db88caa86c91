"""Blocks under keys of an engine's own, in batches: asked for, read into buffers that the engine
chooses, stored from them. For engines whose memory is theirs alone, and whose keys are hashes.

    objects = open_objects(address, identity, num_bytes)
    objects.put_from(keys, buffers); objects.exists(keys); objects.get_into(keys, buffers)

Calls block, and threads may share them; completions.py makes futures of them, with an eventfd. They
answer a bool for each key. A fault is a no: without a daemon nothing is there, and nothing is
stored; when there is one again it goes on. Not here: sessions (keeper.py), staging pages
(staging.py).
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from kvc2 import _core, errors
from kvc2.answers import NOWHERE
from kvc2.client.client import Client
from kvc2.client.connection import NamespaceHandle, SessionOptions
from kvc2.client.memory import ArenaView, PoolMemory
from kvc2.client.staging import Staging
from kvc2.client.streams import Streams
from kvc2.host.address import Address
from kvc2.layout import Layout, Segment

Bools: TypeAlias = NDArray[np.bool_]
# One contiguous buffer of all, or a list of one for each key. An address is a buffer too:
# (ctypes.c_ubyte * num_bytes).from_address(address).
Buffers: TypeAlias = Buffer | list[Buffer]

log = logging.getLogger(__name__)

KEYS_A_CALL = 1024  # the daemon's index is locked for 1.5 to 3 us a key
BYTES_A_CALL = 64 << 20  # what one lease brings from the disk before its deadline
LEASES_A_CALL = 32
STAGING_BYTES = 64 << 20
ATTACH_WAIT_S = 1.0
COPY_THREADS = 2  # share one copy of many bytes
_request_numbers = itertools.count()


class Storing(Protocol):
    """How blocks come into the arena."""

    def store(self, keys: Sequence[bytes], sources: list[Buffer]) -> Bools:
        """[n] whether each is there then; each key once. Raises Detached and LimitReached."""


class Objects:
    """Blocks of num_bytes each, of one namespace, in a session that reads the arena. Threads may
    share it. `open_objects` makes one, and `of` one of another size on the same client."""

    def __init__(
        self,
        client: Client,
        namespace: NamespaceHandle,
        storing: Storing,
        *,
        num_bytes: int,
        close: Callable[[], None],
    ) -> None:
        self.client = client
        self.num_bytes = num_bytes
        self._namespace = client.open_handle(namespace)
        self._storing = storing
        self._close = close
        # nobody waits for the end of a lease
        self._releasing = ThreadPoolExecutor(1, "kvc2-release")
        self._ended: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._locked: dict[int, list[bytes]] = {}  # leases by token
        self._tokens = itertools.count(1)

    def of(self, identity: bytes, num_bytes: int) -> Objects:
        """Blocks of another size, on this one's client: they are read in the same way, but come to
        the daemon by a stream, since a session copies from pages of one layout."""
        handle = NamespaceHandle(identity, layout=_layout(num_bytes), opaque=True)
        storing = Streamed(Streams(self.client), handle)
        return Objects(self.client, handle, storing, num_bytes=num_bytes, close=lambda: None)

    def wait_attached(self, timeout_s: float = ATTACH_WAIT_S) -> bool:
        """Whether there is a session, for which it may wait: an engine that asks at once, and takes
        a no for final, would have nothing."""
        attached = self.client.wait_attached(timeout_s)
        if not attached:
            log.warning("no session with the daemon yet: all is a miss until there is one")
        return attached

    def exists(self, keys: Sequence[bytes]) -> Bools:
        """[n] whether each is in any tier. Changes nothing."""

        def match(part: slice) -> Bools:
            return np.asarray(self.client.match_keys(self._namespace, keys[part]) != 0)

        return self._in_parts(keys, match, moves=False)

    def get_into(self, keys: Sequence[bytes], buffers: Buffers) -> Bools:
        """[n] whether each was read into its part of `buffers`, writable. Where it was not, the
        part's content is undefined. InvalidRequest for what doesn't fit."""
        targets = self._rows(buffers, len(keys), writable=True)
        return self._in_parts(keys, lambda part: self._get(keys[part], targets[part]))

    def put_from(self, keys: Sequence[bytes], buffers: Buffers) -> Bools:
        """[n] whether each is in memory now; what was there stays as it is. The buffers are the
        caller's again."""
        sources = self._rows(buffers, len(keys), writable=False)
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        once = sorted(first.values())  # a call may name a key once
        alone, of_alone = [keys[each] for each in once], [sources[each] for each in once]
        stored = self._in_parts(
            alone, lambda part: self._storing.store(alone[part], of_alone[part])
        )
        by_key = dict(zip(alone, stored.tolist(), strict=True))
        return np.array([by_key[key] for key in keys], np.bool_)

    def lock(self, keys: Sequence[bytes]) -> tuple[int, Bools]:
        """Bring them to memory and keep them there until `unlock` of the token, or the session's
        end; [n] which are."""
        leases: list[bytes] = []
        try:
            found = self._in_parts(keys, lambda part: self._hold(keys[part], leases))
        except BaseException:
            self._release(leases)  # nobody is told a token
            raise
        with self._lock:
            token = next(self._tokens)
            self._locked[token] = leases
        return token, found

    def unlock(self, token: int) -> None:
        """Idempotent. Doesn't wait for the daemon."""
        with self._lock:
            leases = self._locked.pop(token, [])
        self._release(leases)

    def close(self) -> None:
        """End the client's session in order, if it is this one's own. No other call may be under
        way, or follow."""
        self._releasing.shutdown(wait=True)
        self._close()

    # ---- one call's worth

    def _in_parts(
        self, keys: Sequence[bytes], do: Callable[[slice], Bools], *, moves: bool = True
    ) -> Bools:
        """Of all keys, by calls of as many as the daemon takes, until one is in vain. `moves`: they
        move as many blocks."""
        done = np.zeros(len(keys), np.bool_)
        with suppress(errors.Detached, errors.LimitReached):
            most = min(KEYS_A_CALL, self.client.limits.max_keys)
            step = max(1, min(most, BYTES_A_CALL // self.num_bytes)) if moves else most
            for begin in range(0, len(keys), step):
                part = slice(begin, begin + step)
                done[part] = do(part)
        return done

    def _get(self, keys: Sequence[bytes], targets: list[Buffer]) -> Bools:
        arena, lease = self.client.arena, _request_id()
        offsets = self.client.acquire_keys(self._namespace, lease, keys, arena=arena).offsets
        try:
            there = offsets != NOWHERE
            into = [targets[each] for each in np.flatnonzero(there).tolist()]
            whole = arena.read_each(offsets[there], self.num_bytes, into)
        finally:
            self._release([lease])
        return there if whole else np.zeros(len(keys), np.bool_)

    def _hold(self, keys: Sequence[bytes], leases: list[bytes]) -> Bools:
        lease = _request_id()
        found = self.client.acquire_keys(self._namespace, lease, keys)
        leases.append(lease)
        return np.asarray(found.offsets != NOWHERE)

    def _release(self, leases: list[bytes]) -> None:
        self._ended.extend(leases)
        self._releasing.submit(self._release_ended)

    def _release_ended(self) -> None:
        """Many in one call, where they come faster than it is answered."""
        leases: list[bytes] = []
        with suppress(IndexError):
            while len(leases) < LEASES_A_CALL:
                leases.append(self._ended.popleft())
        if leases:
            with suppress(errors.Detached):  # they have ended with their session
                self.client.release(leases)

    def _rows(self, buffers: Buffers, count: int, *, writable: bool) -> list[Buffer]:
        """One for each key. Raises InvalidRequest."""
        if not isinstance(buffers, list):
            self._check(buffers, count * self.num_bytes, writable=writable)
            rows = np.frombuffer(memoryview(buffers), np.uint8).reshape(count, self.num_bytes)
            return list(rows)
        if len(buffers) != count:
            raise errors.InvalidRequest("buffers", f"{len(buffers)} of them", f"{count}, by key")
        for each in buffers:
            self._check(each, self.num_bytes, writable=writable)
        return buffers

    def _check(self, buffer: Buffer, num_bytes: int, *, writable: bool) -> None:
        view = memoryview(buffer)
        if view.nbytes != num_bytes or not view.c_contiguous or (writable and view.readonly):
            kind = "read-only" if view.readonly else "writable"
            wanted = f"contiguous{' and writable' if writable else ''}, {num_bytes} bytes"
            raise errors.InvalidRequest("buffers", f"{kind}, {view.nbytes} bytes", wanted)


class Copied:
    """Storing by copied commits, from the pages of a pool of which each holds a block."""

    def __init__(
        self, client: Client, pool: PoolMemory, staging: Staging, namespace: NamespaceHandle
    ) -> None:
        """The client's engine is `staging`, whose pages are those of the pool."""
        self._client = client
        self._staging = staging
        self._namespace = namespace
        self._pages = pool.map
        self._num_bytes = pool.num_bytes // staging.num_pages
        self._team = _core.ThreadTeam(COPY_THREADS)

    def store(self, keys: Sequence[bytes], sources: list[Buffer]) -> Bools:
        done = np.zeros(len(keys), np.bool_)
        begin = 0
        while begin < len(keys):
            arena, era = self._session()
            pages = self._staging.take(len(keys) - begin)
            end = begin + pages.size
            self._fill(pages, sources[begin:end])
            done[begin:end] = self._commit(keys[begin:end], pages, arena, era)
            begin = end
        return done

    def _session(self) -> tuple[ArenaView, int]:
        """Of the session that there is, its arena and era. Raises Detached."""
        era = self._staging.era
        arena = self._client.arena
        if self._staging.era != era:
            raise errors.Detached("dead", "the session has changed")
        return arena, era

    def _fill(self, pages: NDArray[np.uint32], sources: list[Buffer]) -> None:
        starts = (pages.astype(np.int64) * self._num_bytes).tolist()
        targets = [self._pages[each : each + self._num_bytes] for each in starts]
        try:
            _core.copy_each(self._team, sources, targets)
        except BaseException:
            self._staging.give_back(pages)
            raise

    def _commit(
        self, keys: Sequence[bytes], pages: NDArray[np.uint32], arena: ArenaView, era: int
    ) -> Bools:
        try:
            answer = self._client.commit_keys(self._namespace, keys, pages, arena=arena)
        except BaseException as error:
            if isinstance(error, errors.Kvc2Error) and not isinstance(error, errors.Detached):
                self._staging.give_back(pages)  # it was answered
            else:
                self._staging.hold(pages, era)
            raise
        self._staging.give_back(pages)
        return np.asarray(answer.results[0] <= _core.DUPLICATE)


class Streamed:
    """Storing by streams, for blocks of another layout than the pool's."""

    def __init__(self, streams: Streams, namespace: NamespaceHandle) -> None:
        self._streams = streams
        self._namespace = namespace

    def store(self, keys: Sequence[bytes], sources: list[Buffer]) -> Bools:
        payloads = [np.frombuffer(memoryview(each), np.uint8).data for each in sources]
        results = self._streams.write_keys(self._namespace, keys, payloads)
        return np.asarray(results <= _core.DUPLICATE)


def open_objects(
    address: str | Address,
    identity: bytes,
    num_bytes: int,
    *,
    engine_name: str = "objects",
    staging_bytes: int = STAGING_BYTES,
) -> Objects:
    """Blocks of num_bytes under keys, with a client of their own, attached in the background. The
    identity's page_size is 1: a block holds what its key says. Raises InvalidRequest for what is no
    address, or no size."""
    layout = _layout(num_bytes)
    num_pages = max(1, staging_bytes // num_bytes)
    pool, staging = PoolMemory(num_pages * num_bytes), Staging(num_pages)
    client = Client(
        address,
        pool=pool,
        layout=layout,
        engine=staging,
        options=SessionOptions(engine_name, arena=True, copy_threads=COPY_THREADS),
    )
    namespace = NamespaceHandle(identity, opaque=True)
    storing = Copied(client, pool, staging, namespace)

    def close() -> None:
        client.close()
        pool.close()

    return Objects(client, namespace, storing, num_bytes=num_bytes, close=close)


def _layout(num_bytes: int) -> Layout:
    return Layout((Segment(0, 0, num_bytes, 0, num_bytes),), 1)


def _request_id() -> bytes:
    return b"objects-%d" % next(_request_numbers)

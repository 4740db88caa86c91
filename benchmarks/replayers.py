"""Processes that replay a trace against a daemon, as an engine's connector would: each asks for its
requests' prefixes in the cpu tier, reads what is there, and stores the rest.

A block of the trace is a block of one token, and its KV is its number, which is compared wherever
it is read. Requests go out in the trace's order, several at a time; those of a conversation go to
one process. Part of admission.py, which starts them.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.answers import NO_ROOM
from kvc2.client import ArenaTerms, Client, LeaseCommit, NamespaceHandle, PoolMemory, SessionOptions
from kvc2.client.staging import Staging
from kvc2.commands import traces
from kvc2.foreign_identity import Foreign
from kvc2.layout import Layout, Segment

IDENTITY = Foreign("benchmark", "none", {"page_size": 1}).encode()
ATTACH_S = 30.0
ANSWER_S = 600.0  # of all requests of a process, after the last one was handed out
DEADLINE_S = 10.0  # of an acquire: what the disk has is waited for
END_S = 5.0
UNDER_WAY = 2  # requests that a process has at a time: one that it works on, and the next


class Served(NamedTuple):
    """What became of a request. `found` leading blocks were read; the acquire took `seconds`, as
    its caller saw it. `without`: how many of its other blocks were given no page. `why`: what
    explains the first missing one, where that was asked."""

    request: int
    found: int
    seconds: float
    without: int
    why: str


class Connector:
    """A client without memory of its own worth telling, which reads the arena in place."""

    def __init__(self, address: str, trace: traces.Trace, payload_bytes: int) -> None:
        longest = int(np.diff(trace.offsets).max(initial=1))
        self._trace, self._bytes = trace, payload_bytes
        self._end = np.array([trace.blocks], np.uint32)  # the token that every request computes
        self._pool, self._staging = PoolMemory(longest * payload_bytes), Staging(longest)
        self._kv = np.frombuffer(self._pool.map, np.uint32).reshape(longest, payload_bytes // 4)
        self._read = np.zeros_like(self._kv)
        self.client = Client(
            address,
            pool=self._pool,
            layout=Layout((Segment(0, 0, payload_bytes, 0, payload_bytes),), 1),
            engine=self._staging,
            options=SessionOptions("connector", arena=True),
        )
        if not self.client.wait_attached(ATTACH_S):
            raise RuntimeError(f"not attached: {self.client.last_refusal}")
        self._namespace = self.client.open_handle(NamespaceHandle(IDENTITY))

    def serve(self, request: int, wanted: int) -> Served:
        """Asks why, where fewer than `wanted` blocks are found. Where the daemon is silent, as on a
        busy machine, it is waited for, and asked again. Raises RuntimeError if what is read is
        another block's."""
        while True:
            try:
                return self._serve(request, wanted)
            except errors.Detached:
                if not self.client.wait_attached(ATTACH_S):
                    raise

    def _serve(self, request: int, wanted: int) -> Served:
        blocks, name = self._trace.request(request), b"%d" % request
        tokens, terms = np.concatenate([blocks, self._end]), ArenaTerms(deadline_s=DEADLINE_S)
        begin = time.perf_counter()
        lease = self.client.acquire_in_arena(self._namespace, name, tokens, terms)
        seconds = time.perf_counter() - begin
        found = lease.offsets.size
        self._compare(lease.offsets, blocks[:found])
        why = ""
        if found < wanted:
            explained = self.client.explain_request(name)
            why = explained.cause or explained.why
        without = self._store(name, found, blocks[found:])
        self.client.release([name])
        return Served(request, found, seconds, without, why)

    def _compare(self, offsets: NDArray[np.uint64], blocks: traces.U32) -> None:
        read = self._read[: blocks.size]
        if not self.client.arena.read(offsets, self._bytes, read.data):
            raise RuntimeError("the session is over")
        if (read != blocks[:, None]).any():
            raise RuntimeError("what was read is another block's")

    def _store(self, name: bytes, first: int, blocks: traces.U32) -> int:
        """How many of them there was no room for."""
        if not blocks.size:
            return 0
        pages = self._staging.take(blocks.size)
        self._kv[pages] = blocks[:, None]
        commit = LeaseCommit(name, first, blocks, pages)
        (results,) = self.client.commit_copies(self._namespace, [commit]).results
        self._staging.give_back(pages)
        return int((results == NO_ROOM).sum())


def serve_all(
    pipe: Connection, free: Any, address: str, trace: traces.Trace, payload_bytes: int
) -> None:
    """A process's work: requests from the pipe until None comes; then what became of them."""
    connector = Connector(address, trace, payload_bytes)
    pipe.send("ready")
    served = []
    while (asked := pipe.recv()) is not None:
        try:
            served.append(connector.serve(*asked))
        finally:
            free.release()
    pipe.send(served)
    connector.client.close()


def previous_turns(trace: traces.Trace) -> NDArray[np.int64]:
    """[requests] the request that each goes on from: the one whose last block is the last of the
    blocks that were asked for before; -1: none, or another request went on from it first."""
    previous = np.full(len(trace), -1, np.int64)
    ended: dict[int, int] = {}  # requests that none has gone on from, by their last block
    known = 0  # blocks are numbered as they are first asked for
    for i in range(len(trace)):
        blocks = trace.request(i)
        if not blocks.size:
            continue
        before = int((blocks < known).sum())
        if before:
            previous[i] = ended.pop(int(blocks[before - 1]), -1)
        ended[int(blocks[-1])] = i
        known = max(known, int(blocks.max()) + 1)
    return previous


def replay(
    address: str,
    trace: traces.Trace,
    wanted: Sequence[int],
    *,
    processes: int,
    payload_bytes: int,
) -> list[Served]:
    """All requests of the trace, by so many processes at once, in the order in which they ended in
    each. Where fewer than `wanted` [requests] blocks are found, it is asked why."""
    context = multiprocessing.get_context("spawn")
    free = context.Semaphore(UNDER_WAY * processes)
    talk = np.arange(len(trace))  # by request: the first of its conversation
    pipes, children = [], []
    with ExitStack() as stack:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            arguments = (theirs, free, address, trace, payload_bytes)
            child = context.Process(target=serve_all, args=arguments, daemon=True)
            child.start()
            theirs.close()
            stack.callback(child.kill)
            stack.callback(child.join, END_S)
            pipes.append(ours)
            children.append(child)
        for pipe in pipes:
            _answer(pipe, ATTACH_S)
        for i, previous in enumerate(previous_turns(trace).tolist()):
            if previous >= 0:
                talk[i] = talk[previous]
            while not free.acquire(timeout=1.0):
                _check_alive(children)
            pipes[talk[i] % processes].send((i, int(wanted[i])))
        for pipe in pipes:
            pipe.send(None)
        return [each for pipe in pipes for each in _answer(pipe, ANSWER_S)]


def _check_alive(children: Sequence[Any]) -> None:
    if any(child.exitcode is not None for child in children):
        raise RuntimeError("a process of the replay died; its error is above")


def _answer(pipe: Connection, timeout_s: float) -> Any:
    """Raises RuntimeError if none comes in time, or its process dies."""
    try:
        if pipe.poll(timeout_s):
            return pipe.recv()
    except EOFError:
        pass
    raise RuntimeError("a process of the replay died or did not answer")

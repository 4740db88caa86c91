"""The calls of the wire, over a session that is kept (keeper.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvc2 import answers, errors
from kvc2.client import channel
from kvc2.client.asking import component_pages, explained, lease_commit, meant
from kvc2.client.connection import EnginePool, NamespaceHandle, SessionOptions
from kvc2.client.keeper import Engine, Keeper, State
from kvc2.client.memory import ArenaView, EngineMemory
from kvc2.client.share import Share
from kvc2.host.address import Address
from kvc2.layout import Layout
from kvc2.v1 import cache_pb2
from kvc2.wire import from_message, to_message

ACQUIRE_MARGIN_S = 1.0  # the daemon answers at its deadline; then it is silent
DURABLE_S = 60.0  # a commit that waits for the disk


@dataclass(frozen=True)
class ArenaTerms:
    """How a lease in the arena is asked for. deadline_s None: the daemon's. skip_blocks: leading
    ones that the client has. With a `poll` number the answer doesn't wait: 0 opens the lease, each
    next number answers what is there by then, the same number the same."""

    grant_pages: int = 0
    deadline_s: float | None = None
    hints: answers.Hints = answers.NO_HINTS
    skip_blocks: int = 0
    poll: int | None = None


IN_ARENA = ArenaTerms()


class Client:
    """A session with the daemon at `address`, attached in the background. Threads may share it.

    Raises InvalidRequest for what is no address. Calls raise errors.Detached when there is no
    session, and another errors.Kvc2Error when the daemon refuses what was asked. The pool holds
    num_bytes // layout.payload_bytes pages.
    """

    def __init__(
        self,
        address: str | Address,
        *,
        pool: EngineMemory,
        layout: Layout,
        engine: Engine,
        options: SessionOptions,
    ) -> None:
        self._keeper = Keeper(address, EnginePool(pool, layout, options), engine)

    @property
    def state(self) -> State:
        return self._keeper.state

    @property
    def last_refusal(self) -> errors.Kvc2Error | None:
        """Why the last try to attach was in vain; None: it was not."""
        return self._keeper.last_refusal

    def wait_attached(self, timeout_s: float) -> bool:
        """Wait until there is a session."""
        return self._keeper.wait_attached(timeout_s)

    def close(self) -> None:
        """End the session in order. Idempotent. on_detached is not called."""
        self._keeper.close()

    def share(self) -> Share:
        """What worker processes of this engine open, to read and fill the pool and to wait for
        layers. Its sessions have the numbers of those that the engine was told of, from 1."""
        return self._keeper.share()

    # ---- calls of a session

    def open_namespace(
        self, identity: bytes, tenant: str = "", salt: bytes = b"", *, ttl_s: int = 0
    ) -> NamespaceHandle:
        """A handle that stays good across sessions. Without one now, it is opened when needed. Its
        blocks match nobody ttl_s after their last use; 0: for ever."""
        return self.open_handle(NamespaceHandle(identity, tenant, salt, ttl_s))

    def open_handle(self, handle: NamespaceHandle) -> NamespaceHandle:
        """The same of a namespace of another layout than the pool's, or of opaque keys."""
        with contextlib.suppress(errors.Detached):
            self._keeper.number(self._keeper.current(), handle)
        return handle

    def match(
        self, namespace: NamespaceHandle, what: answers.U32 | answers.Asked
    ) -> answers.Matched:
        """The longest cached prefix of some tokens. Changes nothing."""
        connection = self._keeper.current()
        request = cache_pb2.MatchRequest(session=connection.head, **meant(what))
        answer = self._keeper.call_in(connection, namespace, "Match", request)
        return from_message(answers.Matched, answer)

    def explain(
        self, namespace: NamespaceHandle, what: answers.U32 | answers.Asked
    ) -> answers.Explained:
        """What an acquire of these tokens, or of one opaque key, would find now, and why not more.
        Changes nothing."""
        connection = self._keeper.current()
        request = explained(what)
        request.session.CopyFrom(connection.head)
        answer = self._keeper.call_in(connection, namespace, "Explain", request)
        return from_message(answers.Explained, answer)

    def explain_request(self, request_id: bytes) -> answers.Explained:
        """What a recent acquire of this session found, and why not more. Changes nothing."""
        connection = self._keeper.current()
        request = cache_pb2.ExplainRequest(session=connection.head, request_id=request_id)
        return from_message(answers.Explained, self._keeper.call(connection, "Explain", request))

    def acquire(
        self,
        namespace: NamespaceHandle,
        request_id: bytes,
        what: answers.U32 | answers.Asked,
        *,
        grant_pages: int = 0,
        deadline_s: float | None = None,
        hints: answers.Hints = answers.NO_HINTS,
    ) -> answers.Acquired:
        """Open a lease on the longest cached prefix of some tokens, in the pool; waits at most
        deadline_s and a margin."""
        request = cache_pb2.AcquireRequest(
            request_id=request_id,
            **meant(what),
            grants=_grants(grant_pages),
            deadline_ms=_milliseconds(deadline_s),
            hints=to_message(hints, cache_pb2.Hints),
        )
        return self._acquire(namespace, request, deadline_s)

    def acquire_in_arena(
        self,
        namespace: NamespaceHandle,
        request_id: bytes,
        what: answers.U32 | answers.Asked,
        terms: ArenaTerms = IN_ARENA,
    ) -> answers.Acquired:
        """Open a lease on the longest cached prefix of some tokens in the cpu tier, to be read by
        `arena`."""
        return self._acquire_in_arena(namespace, request_id, what, terms)

    def _acquire(
        self,
        namespace: NamespaceHandle,
        request: cache_pb2.AcquireRequest,
        deadline_s: float | None,
        arena: ArenaView | None = None,
    ) -> answers.Acquired:
        connection = self._keeper.current(arena)
        request.session.CopyFrom(connection.head)
        if deadline_s is None:
            deadline_s = connection.limits.acquire_deadline_ms / 1000
        wait_s = deadline_s + ACQUIRE_MARGIN_S
        try:
            answer = self._keeper.call_in(connection, namespace, "Acquire", request, wait_s)
        except errors.Detached:
            self._keeper.orphans.add(request.request_id)
            raise
        return from_message(answers.Acquired, answer)

    def acquire_keys(
        self,
        namespace: NamespaceHandle,
        request_id: bytes,
        keys: Sequence[bytes],
        terms: ArenaTerms = IN_ARENA,
        *,
        arena: ArenaView | None = None,
    ) -> answers.Acquired:
        """Open a lease in the arena on those of these opaque keys that are there: `found` and
        `offsets` have an element for each, NOWHERE where it isn't there (yet). With `arena` only in
        the session that this view is of: Detached otherwise."""
        asked = answers.Asked(keys=keys)
        return self._acquire_in_arena(namespace, request_id, asked, terms, arena)

    def _acquire_in_arena(
        self,
        namespace: NamespaceHandle,
        request_id: bytes,
        what: answers.U32 | answers.Asked,
        terms: ArenaTerms,
        arena: ArenaView | None = None,
    ) -> answers.Acquired:
        request = cache_pb2.AcquireRequest(
            request_id=request_id,
            **meant(what),
            grants=_grants(terms.grant_pages),
            deadline_ms=_milliseconds(terms.deadline_s),
            hints=to_message(terms.hints, cache_pb2.Hints),
            place=1,
            skip_blocks=terms.skip_blocks,
            at_once=terms.poll is not None,
            poll=terms.poll or 0,
        )
        return self._acquire(namespace, request, terms.deadline_s, arena)

    def match_keys(self, namespace: NamespaceHandle, keys: Sequence[bytes]) -> NDArray[np.uint8]:
        """[n] of each opaque key 0, or 1 gpu, 2 cpu, 3 disk: the fastest tier. Changes nothing."""
        connection = self._keeper.current()
        request = cache_pb2.MatchRequest(session=connection.head, keys=keys)
        answer = self._keeper.call_in(connection, namespace, "Match", request)
        return from_message(answers.Matched, answer).found

    def commit_keys(
        self,
        namespace: NamespaceHandle,
        keys: Sequence[bytes],
        pages: NDArray[np.uint32],
        *,
        durable: bool = False,
        arena: ArenaView | None = None,
    ) -> answers.Committed:
        """Copy filled pages into the arena, each as the block of an opaque key: they are this
        client's again with the answer. `arena` as in acquire_keys."""
        commit = cache_pb2.LeaseCommit(keys=keys, pages=component_pages(pages))
        request = cache_pb2.CommitRequest(leases=[commit], durable=durable)
        return self._commit_copies(namespace, request, arena)

    def commit(
        self,
        commits: Sequence[answers.LeaseCommit],
        *,
        grant_pages: int = 0,
        durable: bool = False,
        prefill_tokens_per_s: float = 0.0,
    ) -> answers.Committed:
        """Make filled pages visible. Call it after the device has finished writing them. The rate
        is what the engine has measured; 0: it doesn't know."""
        connection = self._keeper.current()
        request = cache_pb2.CommitRequest(
            session=connection.head,
            leases=[lease_commit(each) for each in commits],
            grants=_grants(grant_pages),
            durable=durable,
            prefill_tokens_per_s=prefill_tokens_per_s,
        )
        wait_s = DURABLE_S if durable else channel.CALL_S
        answer = self._keeper.call(connection, "Commit", request, wait_s)
        return from_message(answers.Committed, answer)

    def commit_copies(
        self,
        namespace: NamespaceHandle,
        commits: Sequence[answers.LeaseCommit],
        *,
        durable: bool = False,
        prefill_tokens_per_s: float = 0.0,
    ) -> answers.Committed:
        """Copy filled pages into the arena: they are this client's again with the answer. Of leases
        in the arena, or, without a request_id, of prompts of the namespace from their first block
        on. The rate as in `commit`."""
        leases = [lease_commit(each) for each in commits]
        request = cache_pb2.CommitRequest(
            leases=leases, durable=durable, prefill_tokens_per_s=prefill_tokens_per_s
        )
        return self._commit_copies(namespace, request)

    def _commit_copies(
        self,
        namespace: NamespaceHandle,
        request: cache_pb2.CommitRequest,
        arena: ArenaView | None = None,
    ) -> answers.Committed:
        connection = self._keeper.current(arena)
        request.session.CopyFrom(connection.head)
        request.copied = True

        def named(number: int) -> None:
            for each in request.leases:
                each.namespace_id = 0 if each.request_id else number

        wait_s = DURABLE_S if request.durable else channel.CALL_S
        answer = self._keeper.call_named(connection, namespace, "Commit", request, named, wait_s)
        return from_message(answers.Committed, answer)

    def release(
        self,
        request_ids: Sequence[bytes],
        *,
        returned: NDArray[np.uint32] = answers.NO_PAGES,
        grant_pages: int = 0,
        hints: Sequence[answers.Hints] = (),
    ) -> answers.Released:
        """Close leases. Call it after the device has finished reading their pages. `hints`: none,
        or one for each, in the place of acquire's where it says anything."""
        connection = self._keeper.current()
        request = cache_pb2.ReleaseRequest(
            session=connection.head,
            request_ids=request_ids,
            returned=component_pages(returned),
            hints=[to_message(each, cache_pb2.Hints) for each in hints],
            grants=_grants(grant_pages),
        )
        return from_message(answers.Released, self._keeper.call(connection, "Release", request))

    def grant(self, pages: int) -> NDArray[np.uint32]:
        """More private pages to fill, maybe fewer than asked for. Not idempotent: never retried."""
        connection = self._keeper.current()
        request = cache_pb2.GrantRequest(session=connection.head, grants=_grants(pages))
        answer = self._keeper.call(connection, "Grant", request, retries=0)
        return from_message(answers.Released, answer).granted_pages

    def invalidate(self, namespace: NamespaceHandle) -> answers.Invalidated:
        """Kill all blocks of a namespace, in every tier. The handle stays good, for new ones."""
        connection = self._keeper.current()
        request = cache_pb2.InvalidateRequest(session=connection.head)
        answer = self._keeper.call_in(connection, namespace, "Invalidate", request)
        return from_message(answers.Invalidated, answer)

    def pin(
        self,
        namespace: NamespaceHandle,
        what: answers.U32 | answers.Asked,
        *,
        tier: str = "cpu",
        hard: bool,
        ttl_s: int = 0,
        keep_stronger: bool = False,
    ) -> answers.PrefixPinned:
        """Keep the full blocks of some tokens in gpu (this session's), cpu or disk, there or not,
        or those of opaque keys in cpu or disk: hard, they are never evicted; else last. A pin of
        cpu or disk outlives the session. It ends after ttl_s; 0: not by itself. It replaces the
        prefix's pin, with keep_stronger only one that is softer, or as hard and ends earlier."""
        connection = self._keeper.current()
        request = cache_pb2.PinRequest(
            session=connection.head,
            **meant(what),
            tier=tier,
            hard=hard,
            ttl_s=ttl_s,
            keep_stronger=keep_stronger,
        )
        answer = self._keeper.call_in(connection, namespace, "Pin", request)
        return from_message(answers.PrefixPinned, answer)

    def unpin(
        self, namespace: NamespaceHandle, what: answers.U32 | answers.Asked, *, tier: str = "cpu"
    ) -> int:
        """End the pin of exactly these blocks, or of each key; how many, 0: there was none."""
        connection = self._keeper.current()
        request = cache_pb2.UnpinRequest(
            session=connection.head,
            **meant(what),
            tier=tier,
        )
        return int(self._keeper.call_in(connection, namespace, "Unpin", request).blocks)

    def prefetch(
        self,
        namespace: NamespaceHandle,
        what: answers.U32 | answers.Asked,
        *,
        tier: str = "cpu",
        deadline_s: float = 0.0,
    ) -> answers.Prefetched:
        """Bring the longest cached prefix of some tokens to cpu or gpu (this session's), or what is
        cached of opaque keys to cpu, without a lease; answers when it is there or the time is over
        (0: at once), and it goes on."""
        connection = self._keeper.current()
        request = cache_pb2.PrefetchRequest(
            session=connection.head,
            **meant(what),
            tier=tier,
            deadline_ms=round(deadline_s * 1000),
        )
        wait_s = deadline_s + channel.CALL_S
        answer = self._keeper.call_in(connection, namespace, "Prefetch", request, wait_s)
        return from_message(answers.Prefetched, answer)

    def wait_layer(self, transfer: int, layer: int, timeout_s: float) -> bool:
        """Wait until `layer` of a transfer is in the pool: no call, no spinning. False after
        timeout_s, or when its session is over."""
        connection = self._keeper.connection
        progress = connection.progress if connection is not None else None
        return progress is not None and progress.wait(transfer, layer, timeout_s)

    @property
    def arena(self) -> ArenaView:
        """Of the session that there is. Raises Detached without one; InvalidRequest when it was not
        asked for."""
        found = self._keeper.current().arena
        if found is None:
            raise errors.InvalidRequest("options.arena", False, "True, to read the arena")
        return found

    @property
    def limits(self) -> answers.Limits:
        """Of the daemon, as its session told. Raises Detached without one."""
        return self._keeper.current().limits


def _milliseconds(deadline_s: float | None) -> int:
    return 0 if deadline_s is None else max(1, round(deadline_s * 1000))


def _grants(pages: int) -> list[cache_pb2.PageCount]:
    return [cache_pb2.PageCount(pages=pages)] if pages else []

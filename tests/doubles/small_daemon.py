"""A small daemon, as an engine's bridge sees it: leases and calls, no processes.

Not here: whose each page is (small_pages), the model that reads and writes them (engine_doubles).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvc2 import errors
from kvc2.answers import (
    Acquired,
    Committed,
    Explained,
    Hints,
    LeaseCommit,
    Limits,
    Matched,
    Released,
    TierBlocks,
    TierTokens,
    of_pages,
)
from kvc2.client.keeper import Engine
from kvc2.client.share import Share
from tests.doubles.small_pages import Moves, SmallPages

PAGE_SIZE = 4
NOTHING_SAID = Hints()


@dataclass
class OpenLease:
    tokens: list[int]
    pinned: list[int]
    blocks: int  # matched or committed
    duplicates: list[int] = field(default_factory=list)


class SmallDaemon:
    """The cache as an engine sees it, with its page laws asserted. One namespace a caller."""

    def __init__(self, pool: np.ndarray, first_grant: int = 4) -> None:
        self.first_grant = first_grant
        self.pages = SmallPages(pool, self._pinned)
        self.leases: dict[bytes, OpenLease] = {}
        self.prefill_rates: list[float] = []  # told with commits
        self.prefetched: list[tuple[Any, list[int]]] = []  # namespace, tokens
        self.pinned_for: list[tuple[Any, list[int], int]] = []  # namespace, tokens, seconds
        self.said: list[tuple[str, bytes, Hints]] = []  # with acquires and releases
        self.found: dict[bytes, Explained] = {}  # what explain_request answers
        self.sibling = np.zeros(0, np.uint32)  # of every block that is missing
        self.arrive = True  # whether promotions complete
        self.fault: errors.Kvc2Error | None = None
        self.refuse = False
        self.engine: Engine | None = None
        self.computing_extra = 0
        self.max_namespaces = 1024

    # sessions

    def attach(self, engine: Engine) -> SmallDaemon:
        self.engine = engine
        self.pages.begin(engine.kept_pages().tolist())
        engine.on_attached(self.pages.grant(self.first_grant))
        return self

    def detach(self, reason: str) -> None:
        assert self.engine is not None
        self.fault = errors.Detached(reason)  # type: ignore[arg-type]
        self.leases.clear()
        self.engine.on_detached(errors.Detached(reason))  # type: ignore[arg-type]

    def reattach(self) -> None:
        assert self.engine is not None
        self.fault = None
        self.attach(self.engine)

    # calls

    def open_namespace(self, identity: bytes, tenant: str = "", salt: bytes = b"") -> Any:
        self._raise()
        return (tenant, salt)

    def acquire(
        self,
        namespace: Any,
        request_id: bytes,
        tokens: Any,
        *,
        grant_pages: int = 0,
        hints: Hints = NOTHING_SAID,
    ) -> Acquired:
        self._raise()
        self.said.append(("acquire", request_id, hints))
        assert request_id not in self.leases
        path = [int(t) for t in tokens]
        most = (len(path) - 1) // PAGE_SIZE
        pages: list[int] = []
        found = {"gpu": 0, "cpu": 0}
        moves: Moves = []
        lease = OpenLease(path, pages, 0)
        self.leases[request_id] = lease  # pins as it goes
        for block in range(most):
            key = self._key(namespace, path, block)
            if (tier := self.pages.bring(key, moves)) is None:
                break
            found[tier] += PAGE_SIZE
            pages.append(self.pages.resident[key])
        lease.blocks = len(pages)
        self.found[request_id] = self._explained(len(path), found, missing=len(pages) < most)
        lease.tokens = [namespace, *path]  # type: ignore[list-item]
        if moves:
            self.pages.transfers.append(moves)
        computing = self._computing(request_id, namespace, path, len(pages))
        return Acquired(
            matched_tokens=len(pages) * PAGE_SIZE,
            tiers=TierTokens(**found),
            held=of_pages(np.array(pages, np.uint32)),
            transfer=len(self.pages.transfers),
            granted=of_pages(self.pages.grant(grant_pages)),
            computing_tokens=computing,
        )

    def commit(
        self,
        commits: Sequence[LeaseCommit],
        *,
        grant_pages: int = 0,
        prefill_tokens_per_s: float = 0.0,
    ) -> Committed:
        self._raise()
        self.prefill_rates.append(prefill_tokens_per_s)
        results = []
        for part in commits:
            lease = self.leases[part.request_id]
            assert part.first_block == lease.blocks, "a commit doesn't continue its lease"
            results.append(np.array(self._commit(lease, part), np.uint8))
        return Committed(
            results=results, durable=False, granted=of_pages(self.pages.grant(grant_pages))
        )

    def release(
        self,
        request_ids: Sequence[bytes],
        *,
        returned: Any,
        grant_pages: int = 0,
        hints: Sequence[Hints] = (),
    ) -> Released:
        self._raise()
        assert len(hints) in (0, len(request_ids))
        told = hints or [NOTHING_SAID] * len(request_ids)
        self.said += [("release", *each) for each in zip(request_ids, told, strict=True)]
        for request_id in request_ids:
            lease = self.leases.pop(request_id, None)
            if lease is not None:
                self.pages.give_back(lease.duplicates)
        self.pages.give_back([int(p) for p in returned])
        return Released(granted=of_pages(self.pages.grant(grant_pages)))

    def grant(self, pages: int) -> Any:
        self._raise()
        return self.pages.grant(pages)

    def prefetch(self, namespace: Any, tokens: Any) -> None:
        self._raise()
        self.prefetched.append((namespace, [int(t) for t in tokens]))

    def pin(
        self,
        namespace: Any,
        what: Any,
        *,
        hard: bool,
        ttl_s: int = 0,
        keep_stronger: bool = False,
    ) -> None:
        self._raise()
        assert not hard
        assert keep_stronger
        self.pinned_for.append((namespace, [int(t) for t in what], ttl_s))

    def match(self, namespace: Any, tokens: Any) -> Matched:
        self._raise()
        path = [int(t) for t in tokens]
        blocks = 0
        while blocks < (len(path) - 1) // PAGE_SIZE:
            if self._key(namespace, path, blocks) not in self.pages.resident:
                break
            blocks += 1
        tiers = TierTokens()
        return Matched(matched_tokens=blocks * PAGE_SIZE, tiers=tiers)

    def explain_request(self, request_id: bytes) -> Explained:
        self._raise()
        if request_id not in self.found:
            raise errors.NotFound("request_id", request_id, "a recent one")
        return self.found[request_id]

    @property
    def limits(self) -> Limits:
        return Limits(1 << 20, 4096, self.max_namespaces, 1024, 1 << 16, 4096, 1 << 24, 2000, 8)

    def wait_attached(self, timeout_s: float) -> bool:
        return self.fault is None

    def wait_layer(self, transfer: int, layer: int, timeout_s: float) -> bool:
        if self.arrive:
            self.pages.arrive(transfer)
        return self.arrive

    def share(self) -> Share:
        raise AssertionError("it has no pool that another process could map")

    def close(self) -> None:
        pass

    # what it owns

    def demote_and_evict(self) -> None:
        """All that nobody pins goes to the cpu tier."""
        self.wait_layer(len(self.pages.transfers), 0, 0.0)
        self.pages.evict(enough=len(self.pages.pool))

    def _pinned(self) -> set[int]:
        return {page for lease in self.leases.values() for page in lease.pinned}

    def _key(self, namespace: Any, path: list[int], block: int) -> tuple[Any, ...]:
        return (namespace, *path[: (block + 1) * PAGE_SIZE])

    def _explained(self, tokens: int, found: dict[str, int], *, missing: bool) -> Explained:
        why = "diverged" if len(self.sibling) else "never_seen"
        runs = tuple(TierBlocks(tier, count // PAGE_SIZE) for tier, count in found.items() if count)
        return Explained(
            page_size=PAGE_SIZE,
            tokens=tokens,
            hit_blocks=sum(blocks for _, blocks in runs),
            runs=runs,
            why=why if missing else "nothing",
            cause="",
            tier="",
            policy="",
            died_s_ago=0.0,
            sibling=self.sibling,
            sibling_equal=max(0, len(self.sibling) - 1),
            other=None,
            namespace="",
            asked_s_ago=0.0,
            uptime_s=1.0,
            dead_known=0,
            dead_forgotten=0,
        )

    def _commit(self, lease: OpenLease, part: LeaseCommit) -> list[int]:
        answers = []
        tokens = part.tokens.tolist()
        namespace, *path = lease.tokens
        for index, page in enumerate(part.pages.tolist()):
            assert page in self.pages.private, f"page {page} is not the engine's"
            begin = (part.first_block + index) * PAGE_SIZE
            path[begin:] = tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            key = self._key(namespace, path, part.first_block + index)
            if self.refuse:
                answers.append(2)
                continue
            adopted = self.pages.adopt(key, page)
            (lease.pinned if adopted else lease.duplicates).append(page)
            answers.append(0 if adopted else 1)
        lease.tokens = [namespace, *path]
        lease.blocks += len(answers)
        return answers

    def _computing(self, request_id: bytes, namespace: Any, path: list[int], matched: int) -> int:
        blocks = 0
        for other_id, other in self.leases.items():
            space, *tokens = other.tokens
            if other_id == request_id or space != namespace:
                continue
            same = 0
            while same < min(len(tokens), len(path)) and tokens[same] == path[same]:
                same += 1
            blocks = max(blocks, same // PAGE_SIZE - matched)
        return (
            min(blocks, (len(path) - 1) // PAGE_SIZE - matched) * PAGE_SIZE + self.computing_extra
        )

    def _raise(self) -> None:
        if self.fault is not None:
            raise self.fault

"""Why a prompt hit or missed: asks the index, and says it in words that a user knows.

The index tells causes, pools and seconds; here they become tiers, a policy and how long ago, the
namespaces of the same tenant are asked whether they have the prompt, and the last requests' answers
are kept. Nothing here changes the cache. The dead and the requests that are kept do not survive a
restart: `uptime_s` says since when anything is known. One thread (the event loop's) uses this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from kvc2 import _core, errors
from kvc2.answers import NO_PAGES, Asked, DifferingField, Explained, OtherNamespace, TierBlocks
from kvc2.cache.brought import NOT_BROUGHT, Brought
from kvc2.cache.counts import Counts
from kvc2.cache.extras import prompt_extras
from kvc2.cache.namespaces import Namespace, Namespaces
from kvc2.config import ServeConfig
from kvc2.namespace import fields_of

RECENT_MAX = 1024  # requests whose answers are kept: under 1 KB each
OTHERS_MAX = 16  # namespaces of a tenant that are asked, those opened last first
SHOWN_MAX = 80  # letters of an identity's field
UNSEEN = (_core.Why.NEVER_SEEN, _core.Why.DIVERGED)


class Found(NamedTuple):
    """What an acquire found, in these tiers; of the cpu tier's blocks, which came from the remote
    store for it."""

    explanation: _core.Explanation
    tiers: Sequence[str]
    brought: Brought = NOT_BROUGHT

    def runs(self) -> Iterator[TierBlocks]:
        """Its blocks in their order, by tier."""
        at = 0
        for tier, blocks in self.explanation.runs.tolist():
            end = at + blocks
            if self.tiers[tier] != "cpu" or not self.brought.of(end):
                yield TierBlocks(self.tiers[tier], blocks)
            else:
                before = max(0, self.brought.first - at)
                come = min(end, self.brought.end) - at - before
                pieces = ("cpu", before), ("remote", come), ("cpu", blocks - before - come)
                yield from (TierBlocks(*each) for each in pieces if each[1] > 0)
            at = end


@dataclass(frozen=True)
class Recent:
    """A request's answer as its acquire found it."""

    second: int
    epoch: int
    namespace: Namespace
    tokens: int
    found: Found


class Explainer:
    """`tick` tells the index the time, and answers it: seconds since the start."""

    def __init__(
        self,
        index: _core.Index,
        namespaces: Namespaces,
        counts: Counts,
        config: ServeConfig,
        *,
        tick: Callable[[], int],
    ) -> None:
        self._index = index
        self._namespaces = namespaces
        self._counts = counts
        self._policy = config.eviction_policy
        self._now = tick
        self._recent: OrderedDict[bytes, Recent] = OrderedDict()

    def keep(
        self,
        epoch: int,
        namespace: Namespace,
        request_id: bytes,
        tokens: int,
        found: Found,
    ) -> None:
        """What an acquire found, for who asks later; the oldest one is dropped for it."""
        self._recent[request_id] = Recent(self._now(), epoch, namespace, tokens, found)
        self._recent.move_to_end(request_id)
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    def of_request(
        self,
        request_id: bytes,
        epoch: int | None = None,
        *,
        tenants: Collection[str] | None = None,
    ) -> Explained:
        """A recent request's answer; one of a session (None: of any) and of these tenants (None: of
        all). Raises NotFound."""
        asked = self._recent.get(request_id)
        if (
            asked is None
            or epoch not in (None, asked.epoch)
            or asked.namespace.gone
            or (tenants is not None and asked.namespace.owner.tenant not in tenants)
        ):
            raise errors.NotFound("request_id", request_id, f"one of the last {RECENT_MAX}")
        answer = self._told(asked.namespace, asked.tokens, asked.found)
        return replace(answer, asked_s_ago=float(self._now() - asked.second))

    def of_asked(self, namespace: Namespace, asked: Asked, session_pool: int | None) -> Explained:
        """What an acquire of these tokens, or of one key, would find now: in the session of that
        gpu pool, or (None) in any session."""
        page_size = namespace.page_size
        count = page_size if namespace.opaque else len(asked.tokens)
        tiers, pools = self._pools(page_size, session_pool)
        if not pools:
            return Explained(page_size, count, why="never_seen", uptime_s=float(self._now()))
        found = self._explanation(namespace.number, page_size, pools, asked)
        answer = self._told(namespace, count, Found(found, tiers))
        if found.why not in UNSEEN:
            return answer
        earlier = self._namespaces.earlier(namespace)
        if earlier is not None:
            before = self._explanation(earlier, page_size, pools, asked)
            if before.death is not None:
                return self._buried(answer, before.death)
        other = self._elsewhere(namespace, asked, answer.hit_blocks * page_size)
        return answer if other is None else replace(answer, why="other_namespace", other=other)

    def _explanation(
        self, number: int, page_size: int, pools: list[int], asked: Asked
    ) -> _core.Explanation:
        """The index's, of all full blocks before a prompt's last token, or of a key."""
        if asked.keys:
            return self._index.explain_keys(number, pools, asked.keys)[0]
        extras = prompt_extras(asked.extras, page_size)
        return self._index.explain(number, pools, asked.tokens[:-1], extras)

    def _pools(self, page_size: int, session_pool: int | None) -> tuple[list[str], list[int]]:
        """Pools of pages of this size with their tiers, fastest first."""
        found: list[tuple[str, int]] = []
        for tier in ("gpu", "cpu", "disk"):
            for pool in self._counts.pool_ids(tier):
                own = session_pool is None or tier != "gpu" or pool == session_pool
                if own and self._index.page_size(pool) == page_size:
                    found.append((tier, pool))
        found = found[:255]  # what the index takes
        return [tier for tier, _ in found], [pool for _, pool in found]

    def _tier_of(self, pool: int) -> str:
        for tier in ("cpu", "disk"):
            if pool in self._counts.pool_ids(tier):
                return tier
        return "gpu"  # of a session, which may be over

    def _told(self, namespace: Namespace, tokens: int, of: Found) -> Explained:
        counts = self._index.counts()
        found, sibling = of.explanation, of.explanation.sibling
        answer = Explained(
            page_size=namespace.page_size,
            tokens=tokens,
            hit_blocks=found.blocks,
            runs=tuple(of.runs()),
            why=found.why.name.lower(),
            sibling_equal=0 if sibling is None else sibling.common,
            sibling=NO_PAGES if sibling is None else sibling.tokens,
            namespace=namespace.name.hex(),
            uptime_s=float(self._now()),
            dead_known=counts.dead_known,
            dead_forgotten=counts.deaths - counts.dead_known,
        )
        return answer if found.death is None else self._buried(answer, found.death)

    def _buried(self, answer: Explained, death: _core.Obituary) -> Explained:
        """The answer of a block that died so, or of a hole."""
        cause = death.cause.name.lower()
        return replace(
            answer,
            why="hole" if answer.why == "hole" else cause,
            cause=cause,
            tier=self._tier_of(death.pool),
            policy=self._policy if death.cause == _core.Cause.EVICTED else "",
            died_s_ago=float(max(0, self._now() - death.when)),
            worth=death.worth,
            victim_worth=death.victim_worth,
        )

    def _elsewhere(self, namespace: Namespace, asked: Asked, hit: int) -> OtherNamespace | None:
        """The namespace of the same owner that has more of these tokens than `hit`, if one has."""
        alike = (namespace.owner, namespace.opaque)
        same = (
            each
            for each in self._namespaces
            if (each.owner, each.opaque) == alike and each is not namespace
        )
        best: OtherNamespace | None = None
        for other in islice(same, OTHERS_MAX):
            _, pools = self._pools(other.page_size, None)
            if not pools:
                continue
            there = self._explanation(other.number, other.page_size, pools, asked)
            found = there.blocks * other.page_size
            if found > max(hit, 0 if best is None else best.hit_tokens):
                fields = differing(namespace.identity, other.identity)
                best = OtherNamespace(other.name.hex(), found, fields)
        return best


def differing(ours: bytes, theirs: bytes) -> tuple[DifferingField, ...]:
    """The fields of two identities that differ, by name."""
    one, two = fields_of(ours), fields_of(theirs)
    return tuple(
        DifferingField(name, str(one.get(name))[:SHOWN_MAX], str(two.get(name))[:SHOWN_MAX])
        for name in sorted(one.keys() | two.keys())
        if (type(one.get(name)), one.get(name)) != (type(two.get(name)), two.get(name))
    )

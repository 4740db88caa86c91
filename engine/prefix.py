"""What is our engine's own on its bridge to the daemon: its counters, and its words for why.

The only file that talks to kvc2.client, whose `Bridge` keeps leases, commits and pages for any
engine. Not responsible for who runs next (scheduler).
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future

from engine.metrics import EngineMetrics
from engine.request import Explanation, Request
from kvc2 import errors
from kvc2._core import ReuseCurve, chain_keys
from kvc2.answers import Explained, TierTokens
from kvc2.client import Bridge as Bridge
from kvc2.client import BridgeConfig as BridgeConfig
from kvc2.client import Counters
from kvc2.client import Daemon as Daemon
from kvc2.client import EngineMemory as EngineMemory
from kvc2.client import Lease as Lease
from kvc2.client import PageBook as PageBook
from kvc2.client import PoolMemory as PoolMemory
from kvc2.client import PrefixLostError as PrefixLostError
from kvc2.client import SoftPin as SoftPin
from kvc2.client import open_bridge as open_bridge
from kvc2.layout import layer_major as layer_major
from kvc2.layout import side_by_side as side_by_side


class BridgeCounters(Counters):
    """The bridge's counts under the engine's names of metrics."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def attached(self) -> None:
        self._metrics.attached.set(1)

    def detached(self, reason: str) -> None:
        self._metrics.attached.set(0)
        self._metrics.detached.labels(reason).inc()

    def attach_failed(self, reason: str) -> None:
        self._metrics.attach_failures.labels(reason).inc()

    def fault(self, call: str) -> None:
        self._metrics.faults.labels(call).inc()

    def committed(self, answer: str, blocks: int) -> None:
        self._metrics.commits.labels(answer).inc(blocks)

    def salt_let_go(self) -> None:
        self._metrics.salts_let_go.inc()


def pool_memory(num_bytes: int, ordinal: int | None) -> EngineMemory:
    """What an engine's pool lies in: of a CUDA device, or memory that the daemon maps (None)."""
    if ordinal is None:
        return PoolMemory(num_bytes)
    from kvc2.cuda.memory import DeviceMemory  # the extra `cuda`

    return DeviceMemory(num_bytes, ordinal)


def explain(bridge: Bridge, lease: Lease) -> Future[Explanation]:
    """Why what the lease found is not longer. Changes nothing, and never fails."""
    told: Future[Explanation] = Future()
    told.set_running_or_notify_cancel()  # who waits no longer leaves it alone
    if bridge.book.session and not lease.session:
        told.set_result(Explanation("not_served"))
        return told

    def tell(asked: Future[Explained | errors.Kvc2Error]) -> None:
        found = asked.result()
        if isinstance(found, Explained):
            told.set_result(explanation_of(found, lease.matched_tokens))
        elif isinstance(found, errors.Detached | errors.Unreachable):
            told.set_result(Explanation("no_daemon"))
        else:  # it has forgotten, or another session answers
            told.set_result(Explanation("unknown"))

    bridge.explain(lease).add_done_callback(tell)
    return told


def explanation_of(found: Explained, matched_tokens: int) -> Explanation:
    """For the answer: no token, no text, and no word of what other prompts hold. A lease that has
    less than the tiers had is explained by that."""
    tiers = dict.fromkeys(("gpu", "cpu", "disk", "remote"), 0)
    place = [tier for tier, blocks in found.runs for _ in range(blocks)]
    for tier in place:
        tiers[tier] += found.page_size
    held, matched = TierTokens(**tiers), matched_tokens // found.page_size
    if matched < found.hit_blocks:
        tier = place[matched] if matched < len(place) else ""  # beyond the runs that are told
        return Explanation("not_loaded", matched, tier=tier, found=held)
    return Explanation(
        found.why,
        None if found.why == "nothing" else found.hit_blocks,
        found.cause,
        found.tier,
        found.policy,
        found.died_s_ago,
        held,
    )


SIZES = tuple(2.0**n for n in range(10, 27, 2))  # tokens of pools, 1,024 to 67 million


class PromptReuse:
    """What pools of KV of other sizes would have had of the prompts. Threads may share it."""

    def __init__(self, page_size: int) -> None:
        self.tokens = 0
        self._page_size = page_size
        self._curve = ReuseCurve()
        self._lock = threading.Lock()

    def note(self, request: Request) -> None:
        """A prompt came: O(its blocks), of which a bounded sample is kept."""
        caller = f"{request.caller.tenant}/{request.caller.salt!r}".encode()
        namespace = hashlib.sha256(caller).digest()
        keys = chain_keys(namespace, request.tokens, self._page_size)
        with self._lock:
            self.tokens += len(request.tokens)
            self._curve.access(keys, self._page_size, len(request.tokens))

    def hit_rates(self) -> tuple[tuple[float, float], ...]:
        """(tokens of a pool, share of the prompts' tokens that it would have had)."""
        with self._lock:
            while self._curve.catch_up():
                pass
            return tuple((size, self._curve.hit_rate(int(size))) for size in SIZES)

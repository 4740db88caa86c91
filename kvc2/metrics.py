"""Counters, gauges and histograms of one daemon, in a registry of their own.

A fault of the cache is served as a miss, and its counter goes up. Not here: events, which are log
lines (events.py), and serving /metrics (server/scrapes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# kind -> what happened. Each is a label of kvc2_faults_total from the start, at zero.
FAULTS = {
    "acquire_deadline": "an acquire answered at its deadline, with a shorter prefix",
    "arena_short": "memory for the arena could not be had: the cpu tier is smaller",
    "catalogue_error": "the disk's catalogue refused a transaction",
    "catalogue_reset": "a damaged catalogue was put aside at start",
    "corrupt_block": "a block's header or payload failed its checksum",
    "disk_full": "the disk had no room, by the file system's word",
    "disk_read": "a read from the disk failed",
    "disk_write": "a write to the disk failed",
    "foreign_block": "a sound block of another name lay where one was expected",
    "fenced_call": "a call of a session that is over, or without its secret",
    "internal_error": "an rpc failed by a fault of the daemon's own",
    "kv_events_lost": "changes were dropped, as too many waited for routers: all is told anew",
    "lost_slab": "a slab file was missing or short",
    "refused_commit": "blocks of a commit were refused: a page or a key was not theirs",
    "refused_request": "a request was refused with INVALID_ARGUMENT",
    "remote_bad_block": "a value in the remote store was not a block of ours: deleted there",
    "remote_error": "a call of the remote store failed: it is left alone until it answers",
    "remote_late": "a request has waited for the remote store as long as it may",
    "remote_refused": "the remote store answered that it won't: it is full, or may only be read",
    "restore_refused": "a catalogue record did not fit at restart",
    "session_crashed": "a session ended without a detach",
    "session_expired": "a session's heartbeats stopped",
    "side_socket_refused": "a hand-over on the side socket was refused",
    "slab_retired": "a sync of a slab failed: nothing is written to it any more",
    "stale_page": "a page's generation was not its record's",
    "token_file_refused": "a changed token_file can't be used: the earlier tokens stay",
    "tls_files_refused": "changed files of TLS can't be used: the earlier ones stay",
    "transfer_failed": "a transfer failed in part or whole",
    "undemoted_lost": "blocks of an ended session had no other copy and were not saved in time",
}

# seconds: the hot calls take 50 us to 1 ms, disk transfers up to seconds
BUCKETS = (50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 1e-3, 2e-3, 5e-3, 0.02, 0.1, 0.5, 2.0, 10.0)

NOT_PUT = (
    "queue_full",
    "store_away",
    "store_refused",
    "store_unable",
    "not_in_memory",
)  # why reused blocks were not put
RECOMPUTED = ("slower", "overdue", "deadline")  # why matched tokens were not brought


REFUSALS = {
    "kvc2_refused_blocks": "Blocks that a tier refused, worth less than what it would have dropped",
    "kvc2_refused_watched": "Of these, blocks that the policy watches for some time",
    "kvc2_refused_regretted": "Of the watched ones, blocks that were asked for again, and missed",
}


@dataclass(frozen=True)
class TierSample:
    """A tier at a scrape: pages by state, what was evicted from it since the start, and its
    estimated hit rate by multiple of its capacity (none: it has no pages)."""

    tier: str
    pages: dict[str, int]
    evicted: int
    last_copies: int
    refusals: tuple[int, int, int]  # by name as in REFUSALS
    hit_rates: dict[float, float] = field(default_factory=dict)


class Metrics:
    """Threads may share it. What `watch_tiers` was given is asked at each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.faults = Counter(
            "kvc2_faults", "Faults, each of which was served as a miss", ["kind"], registry=registry
        )
        for kind in FAULTS:
            self.faults.labels(kind)
        self.prompt_tokens = Counter(
            "kvc2_prompt_tokens", "Tokens of acquired prompts", registry=registry
        )
        self.matched_tokens = Counter(
            "kvc2_matched_tokens", "Leased tokens by where they lay", ["tier"], registry=registry
        )
        self.committed_blocks = Counter(
            "kvc2_committed_blocks",
            "Blocks of commits: adopted, duplicate or refused",
            ["result"],
            registry=registry,
        )
        pair = ["source", "target"]
        self.transfer_blocks = Counter(
            "kvc2_transfer_blocks", "Blocks that a transfer brought", pair, registry=registry
        )
        self.transfer_bytes = Counter(
            "kvc2_transfer_bytes", "Bytes that transfers brought", pair, registry=registry
        )
        self.transfer_seconds = Histogram(
            "kvc2_transfer_seconds", "Time of one batch", pair, buckets=BUCKETS, registry=registry
        )
        self.rpc_seconds = Histogram(
            "kvc2_rpc_seconds",
            "Daemon's own time of a call, waiting for slower tiers included",
            ["rpc"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.rpcs = Counter("kvc2_rpcs", "Calls by status", ["rpc", "status"], registry=registry)
        self.sessions = Gauge("kvc2_sessions", "Open sessions", registry=registry)
        self.leases = Gauge("kvc2_leases", "Open leases", registry=registry)
        self._add_pace(registry)

    def _add_pace(self, registry: CollectorRegistry) -> None:
        """What decides whether a prefix is brought or computed, and how often the latter."""
        self.recomputed_tokens = Counter(
            "kvc2_recomputed_tokens",
            "Matched tokens that the engine computes: sooner by the tier's estimate (slower), "
            "or bringing them overran it (overdue) or the acquire's deadline (deadline)",
            ["why"],
            registry=registry,
        )
        for why in RECOMPUTED:
            self.recomputed_tokens.labels(why)
        self.bandwidth = Gauge(
            "kvc2_bandwidth_bytes_per_s",
            "Measured bandwidth of bringing pages from a tier to the next faster one",
            ["tier"],
            registry=registry,
        )
        self.queue = Gauge(
            "kvc2_queue_s",
            "Measured wait of a transfer from a tier before its first byte",
            ["tier"],
            registry=registry,
        )
        self.prefill_rate = Gauge(
            "kvc2_prefill_tokens_per_s",
            "Prefill rate as a session's engine measured it",
            ["session"],
            registry=registry,
        )

    def fault(self, kind: str, count: int = 1) -> None:
        """Count a fault. KeyError for a kind that FAULTS doesn't explain."""
        if kind not in FAULTS:
            raise KeyError(kind)
        self.faults.labels(kind).inc(count)

    def watch_tiers(self, tiers: Callable[[], Iterable[TierSample]]) -> None:
        """Publish pages and evictions by tier from `tiers`, called at each scrape."""
        self.registry.register(_Tiers(tiers))

    def values(self) -> dict[str, float]:
        """Every counter and gauge: name without kvc2_, labels by commas, buckets left out."""
        found = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                labels = ",".join(f"{key}={sample.labels[key]}" for key in sorted(sample.labels))
                name = sample.name.removeprefix("kvc2_")
                found[f"{name}{{{labels}}}" if labels else name] = sample.value
        return found


class RemoteMetrics:
    """What is counted of a remote store besides, where there is one. `all`: the daemon's own."""

    def __init__(self, metrics: Metrics) -> None:
        self.all = metrics
        registry = metrics.registry
        self.up = Gauge("kvc2_remote_up", "1: the remote store is asked", registry=registry)
        self.not_put = Counter(
            "kvc2_remote_not_put_blocks",
            "Reused blocks that were not put into the remote store",
            ["why"],
            registry=registry,
        )
        for why in NOT_PUT:
            self.not_put.labels(why)

    def moved(self, way: tuple[str, str], blocks: int, payload_bytes: int) -> None:
        """Blocks have gone from the one tier to the other."""
        self.all.transfer_blocks.labels(*way).inc(blocks)
        self.all.transfer_bytes.labels(*way).inc(blocks * payload_bytes)


class RateMetrics:
    """What each tenant has had, and what its limits of rate have refused it."""

    def __init__(self, registry: CollectorRegistry, tenants: Iterable[str]) -> None:
        calls = Counter(
            "kvc2_tenant_calls",
            "Calls of a tenant: those that name one of its namespaces or leases, or are its alone",
            ["tenant"],
            registry=registry,
        )
        payloads = Counter(
            "kvc2_tenant_payload_bytes",
            "Bytes of payloads of a tenant's Read, Write and Commit",
            ["tenant"],
            registry=registry,
        )
        self._refused = Counter(
            "kvc2_rate_limited_calls",
            "Calls of a tenant that were refused, or commits among others', and by which limit",
            ["tenant", "limit"],
            registry=registry,
        )
        self._taken = {each: (calls.labels(each), payloads.labels(each)) for each in tenants}

    def taken(self, tenant: str, num_bytes: int) -> None:
        calls, payloads = self._taken[tenant]
        calls.inc()
        if num_bytes:
            payloads.inc(num_bytes)

    def refused(self, tenant: str, limit: str) -> None:
        self._refused.labels(tenant, limit).inc()


class _Tiers(Collector):
    def __init__(self, tiers: Callable[[], Iterable[TierSample]]) -> None:
        self._tiers = tiers

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry would else ask for a scrape when this is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        pages = GaugeMetricFamily("kvc2_pages", "Pages by owner", labels=["tier", "state"])
        evicted = CounterMetricFamily(
            "kvc2_evicted_blocks", "Blocks that lost their page in a tier", labels=["tier"]
        )
        last_copies = CounterMetricFamily(
            "kvc2_last_copies", "Of these, blocks that no tier held any more", labels=["tier"]
        )
        refusals = [
            CounterMetricFamily(name, what, labels=["tier"]) for name, what in REFUSALS.items()
        ]
        rates = GaugeMetricFamily(
            "kvc2_estimated_hit_rate",
            "Share of prompts' tokens in this tier or a faster one, were it so many times as large",
            labels=["tier", "multiple"],
        )
        for each in self._tiers():
            for multiple, rate in each.hit_rates.items():
                rates.add_metric([each.tier, f"{multiple:g}"], rate)
            for state, count in each.pages.items():
                pages.add_metric([each.tier, state], count)
            evicted.add_metric([each.tier], each.evicted)
            last_copies.add_metric([each.tier], each.last_copies)
            for family, count in zip(refusals, each.refusals, strict=True):
                family.add_metric([each.tier], count)
        yield from (pages, evicted, last_copies, *refusals, rates)

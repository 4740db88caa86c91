"""The engine's Prometheus metrics. Every fault of the cache that a request survived has a counter.

Not responsible for serving them (http).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# TTFT reaches from a GPU hit of some milliseconds to a cold prefill of minutes on a CPU
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class EngineMetrics:
    """One registry an engine, so that tests can have many in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvc2_engine_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kvc2_engine_{name}", text, labels, registry=self.registry)

        self.requests = counter("requests", "Requests ended, by outcome", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that began to answer")
        self.matched_tokens = counter("matched_tokens", "Of these, found cached, by tier", "tier")
        self.prefilled_tokens = counter("prefilled_tokens", "Tokens computed by prefill")
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.steps = counter("steps", "Steps of the runner")
        self.preemptions = counter("preemptions", "Requests set back since pages ran out")
        self.prefix_lost = counter("prefix_lost", "Requests recomputed: a promotion didn't arrive")
        self.waits = counter("waits", "Requests that waited for another's commits of their prefix")
        self.faults = counter("faults", "Calls of the daemon that failed, by call", "call")
        self.salts_let_go = counter(
            "salts_let_go",
            "Namespaces not used for long, forgotten for others until they come back",
        )
        self.detached = counter("detached", "Sessions with the daemon that ended, by why", "reason")
        self.attach_failures = counter(
            "attach_failures", "Tries to attach to the daemon that were in vain, by why", "reason"
        )
        self.commits = counter("commits", "Blocks committed, by answer", "answer")
        self.attached = gauge("attached", "1 while there is a session with the daemon")
        self.running = gauge("running", "Requests in the batch")
        self.waiting = gauge("waiting", "Requests not yet in the batch")
        self.pages = gauge("pages", "Pages of the pool, by owner", "owner")
        self.prefill_rate = gauge("prefill_tokens_per_second", "Measured over recent steps")
        self.ttft = Histogram(
            "kvc2_engine_ttft_seconds",
            "Time from arrival to the first token",
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )


class ExpertMetrics(Collector):
    """What GET /experts tells, as metrics. `state` is asked at each scrape."""

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        told = self._state()
        yield _counter("activations", "Experts chosen, one for each of a token", told)
        if told["placed"]:
            yield _counter("exchanges", "Experts that moved to the device for another", told)
            yield _counter("failed_copies", "Copies to the device that failed", told)
            yield _gauge("hot", "Experts on the device", told)
            share = "Share of activations that the device served"
            family = GaugeMetricFamily("kvc2_engine_experts_device_share", share, labels=["layer"])
            for each in told["by_layer"]:
                family.add_metric([str(each["layer"])], each["device_share"])
            yield family
        if "read_bytes" in told:
            yield _counter("read_bytes", "Read of experts on disk", told)
            yield _counter("memory_hits", "Experts in memory when their layer began", told)
            yield _counter("memory_misses", "Experts that a layer had to wait for", told)
        yield from _memory(told.get("budget", {}), "device", "", ("activations", "hits"))
        yield from _memory(told.get("host_budget", {}), "host", "host_", ("needed", "hits"))


def _memory(
    told: dict[str, Any], place: str, prefix: str, brings: tuple[str, ...]
) -> Iterator[Metric]:
    """A budget of memory: what has how much of it, and what another GB would bring."""
    bytes_of = f"{place.capitalize()} memory, 10^9 bytes, by what lies there"
    memory = GaugeMetricFamily(f"kvc2_engine_{place}_memory_gb", bytes_of, labels=["what"])
    now = told.get("now", {})
    for what in ("experts", "kv"):
        if f"{what}_gb" in now:
            memory.add_metric([what], now[f"{what}_gb"])
    yield memory
    shares = f"What another GB of {place} memory would bring: shares of {' and of '.join(brings)}"
    another = GaugeMetricFamily(f"kvc2_engine_another_{prefix}gb", shares, labels=["what"])
    for what in brings:
        if what in told.get("another_gb", {}):
            another.add_metric([what], told["another_gb"][what])
    yield another


def _counter(name: str, text: str, told: dict[str, Any]) -> Metric:
    return CounterMetricFamily(f"kvc2_engine_experts_{name}", text, value=told[name])


def _gauge(name: str, text: str, told: dict[str, Any]) -> Metric:
    return GaugeMetricFamily(f"kvc2_engine_experts_{name}", text, value=told[name])

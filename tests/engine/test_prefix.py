"""What is our engine's own on the bridge: its counters under the names of its metrics."""

from __future__ import annotations

from engine.metrics import EngineMetrics
from engine.prefix import BridgeCounters


def test_each_count_of_the_bridge_has_its_metric() -> None:
    metrics = EngineMetrics()
    counters = BridgeCounters(metrics)
    value = metrics.registry.get_sample_value
    counters.attached()
    assert value("kvc2_engine_attached") == 1
    counters.detached("silent")
    counters.attach_failed("no_socket")
    counters.fault("acquire")
    counters.committed("adopted", 3)
    counters.committed("duplicate", 0)
    counters.salt_let_go()
    assert value("kvc2_engine_attached") == 0
    assert value("kvc2_engine_detached_total", {"reason": "silent"}) == 1
    assert value("kvc2_engine_attach_failures_total", {"reason": "no_socket"}) == 1
    assert value("kvc2_engine_faults_total", {"call": "acquire"}) == 1
    assert value("kvc2_engine_commits_total", {"answer": "adopted"}) == 3
    assert value("kvc2_engine_commits_total", {"answer": "duplicate"}) == 0
    assert value("kvc2_engine_salts_let_go_total") == 1

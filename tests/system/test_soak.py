"""benchmarks.soak for a while on a small model: no wrong answer, and nothing leaks. Throughput is
left to whoever runs it on a machine that does nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import soak
from tests.system.engine import small_model


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_minutes_of_everything_at_once(tmp_path: Path) -> None:
    model, told = small_model(tmp_path / "model"), tmp_path / "told.json"
    sizes = ["--cpu-gb", "0.016", "--disk-gb", "0.1", "--prompts", "24"]
    words = ["--minutes", "2", "--model", str(model), *sizes, "--slowest", "0"]
    code = soak.main([*words, "--json", str(told)])
    found = json.loads(told.read_text())
    assert (code, found["failures"]) == (0, [])
    counts = found["counts"]
    for what in ("whole: equal", "streamed: equal", "vanished", "stalled"):
        assert counts[what] > 10, counts
    assert all(counts[f"act: {act}"] >= soak.PARTS for act in soak.ACTS)


def test_a_process_that_holds_more_than_before_is_told() -> None:
    before = soak.Held("first", 1, 100.0, 50, 20)
    same = soak.Held("first", 1, 130.0, 54, 12)
    assert soak.growth(before, same, 64.0) == []
    grown = soak.Held("first", 1, 170.0, 55, 29)
    assert [each.split()[1] for each in soak.growth(before, grown, 64.0)] == [
        "descriptors",
        "threads",
        "memory_mib",
    ]

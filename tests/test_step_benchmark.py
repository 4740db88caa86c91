"""benchmarks.step over a small model: it splits whatever step the scheduler computed."""

from __future__ import annotations

from typing import cast

import pytest

from benchmarks import step
from benchmarks.unit_probe import UnitProbe
from tests.doubles.checkpoints import make_mixtral


class Reads:
    """A probe that takes no time."""

    def read_gb_per_s(self, address: int, num_bytes: int) -> float:
        return 1.0


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> step.Ours:
    return step.Ours(make_mixtral(tmp_path_factory.mktemp("model") / "model"), 64 * step.PAGE_SIZE)


@pytest.mark.parametrize("users", [1, 2])
@pytest.mark.parametrize("context", range(step.PAGE_SIZE, 2 * step.PAGE_SIZE))
def test_a_step_is_split_wherever_its_contexts_end_in_a_page(
    ours: step.Ours, monkeypatch: pytest.MonkeyPatch, context: int, users: int
) -> None:
    monkeypatch.setattr(step, "PROBE_BYTES", 1)
    bench = step.Bench(ours, {}, {}, cast(UnitProbe, Reads()), repeats=1)
    rows = bench.decode(users, context)
    assert rows[0].case == f"decode step, {users} x {context}"
    assert {"  experts", "  linear", "  attention", "  rest"} <= {row.case for row in rows}

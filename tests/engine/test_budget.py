"""Device memory is divided by what each part saves, never beyond what there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import asking
from engine.budget import Budget, Division, Measured, Sizes, decided, divide, saved_s, shares
from engine.experts import statistics
from engine.models.placed import measured_in
from engine.serve import Engine, assemble
from engine.settings import EngineConfig
from kvc2.errors import InvalidConfig
from tests.system.engine import small_model

SIZES = Sizes(expert_bytes=1000, total=64, beside=4, page_bytes=500, page_size=16)
MEASURED = Measured(100, 1.0, 100, 0.1, 5000, 100.0, ((160.0, 0.2), (1600.0, 0.6)))
COUNTS = np.random.default_rng(0).zipf(1.5, (4, 16)).clip(0, 1000).astype(float)


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(model=Path("m"), chunk_size=16, max_running=1, **fields)


def test_shares_are_those_of_the_most_chosen() -> None:
    assert shares(np.array([[1.0, 6.0], [0.0, 3.0]])).tolist() == [0.0, 0.6, 0.9, 1.0, 1.0]
    assert shares(np.zeros((2, 2))).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]  # nothing is known


@settings(max_examples=100, deadline=None)
@given(st.floats(6000, 300_000), st.floats(0, 1), st.floats(0, 1e6), st.floats(0, 1))
def test_a_division_fits_and_none_would_have_saved_more(
    total: float, host_s: float, prompts: float, rate: float
) -> None:
    measured = replace(
        MEASURED, host_s=host_s, prompt_tokens=prompts, hit_rates=((160.0, 0.0), (1600.0, rate))
    )
    made = divide(total, 2, SIZES, COUNTS, measured)
    assert made.by == "measured"
    assert made.pages >= 2
    assert (made.hot + SIZES.beside) * 1000 + made.pages * 500 <= total

    def saved(hot: int, pages: int) -> float:
        found = saved_s(COUNTS, measured, SIZES, np.array([hot]), np.array([pages]))
        assert found is not None
        return float(found[0])

    for hot in range(65):
        pages = (int(total) - (hot + 4) * 1000) // 500
        if pages >= 2:
            assert saved(hot, pages) <= saved(made.hot, made.pages)


def test_what_saves_nothing_gets_nothing() -> None:
    no_hits = replace(MEASURED, hit_rates=((1600.0, 0.0),))
    assert divide(100_000, 2, SIZES, COUNTS, no_hits).hot == 64
    no_gain = replace(MEASURED, device_s=1.0)
    assert divide(100_000, 2, SIZES, COUNTS, no_gain).hot == 0


@pytest.mark.parametrize("lacks", ["host_activations", "prefill_tokens_per_s", "hit_rates"])
def test_without_a_measurement_each_gets_half(lacks: str) -> None:
    unknown = replace(MEASURED, **{lacks: () if lacks == "hit_rates" else 0.0})
    assert divide(100_000, 2, SIZES, COUNTS, unknown) == Division(46, 100, "half each")
    assert divide(2000, 2, Sizes(1000, 64, 0, 500, 16), COUNTS, unknown).hot == 1


def test_what_the_user_gives_stays() -> None:
    by = config(gpu_memory_gb=1e-4, num_pages=20)
    assert decided(by, SIZES, None, COUNTS, MEASURED) == Division(64, 20, "given")
    assert decided(by, SIZES, 5, COUNTS, MEASURED) == Division(5, 20, "given")
    by = config(gpu_memory_gb=1e-4, kv_memory_gb=2e-5)
    assert decided(by, SIZES, None, COUNTS, MEASURED) == Division(64, 40, "given")
    by = config(gpu_memory_gb=1e-4)
    assert decided(by, SIZES, 10, COUNTS, MEASURED) == Division(10, 172, "given")


@pytest.mark.parametrize(
    ("fields", "hot"),
    [({}, 64), ({"num_pages": 30}, None), ({"num_pages": 18}, 3), ({"kv_memory_gb": 1.0}, None)],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], hot: int | None) -> None:
    with pytest.raises(InvalidConfig, match=r"gpu_memory_gb = 1e-05: .* need \d"):
        decided(config(gpu_memory_gb=1e-5, **fields), SIZES, hot, COUNTS, MEASURED)
    with pytest.raises(InvalidConfig, match="at least"):
        decided(config(gpu_memory_gb=4e-6), SIZES, None, COUNTS, MEASURED)


def test_measurements_of_runs_add_up() -> None:
    later = Measured(50, 1.0, 0, 0, 100, 0.0, ((16.0, 0.5),))
    both = MEASURED.plus(later)
    assert (both.host_activations, both.host_s, both.prompt_tokens) == (150, 2.0, 5100)
    assert both.prefill_tokens_per_s == 100.0  # the later run had no prefill
    assert both.hit_rates == ((16.0, 0.5),)


@pytest.mark.parametrize("name", ["counts.json", "counts.safetensors"])
def test_measurements_are_kept_beside_the_counts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    statistics.save(path, COUNTS, "m", asdict(MEASURED))
    assert measured_in(path) == MEASURED
    assert np.array_equal(statistics.load("k", path, 4, 16), COUNTS)
    statistics.save(path, COUNTS, "m")
    assert measured_in(path) == Measured()
    assert measured_in(tmp_path / "none.json") == Measured()


@pytest.mark.parametrize("wrong", [[], {"host_s": "x"}, {"hit_rates": 3}, {"host_s": -1.0}, None])
def test_measurements_that_are_none_are_left_out(tmp_path: Path, wrong: Any) -> None:
    told: Any = asdict(MEASURED) | wrong if isinstance(wrong, dict) else wrong
    path = tmp_path / "counts.json"
    statistics.save(path, COUNTS, "m", told)
    assert measured_in(path) == Measured()


def test_another_gb_is_worth_what_it_adds() -> None:
    sizes = Sizes(250_000_000, 64, 0, 1_000_000, 16)
    measured = replace(MEASURED, hit_rates=((16_000.0, 0.25), (32_000.0, 0.5)))
    told = Budget(None, 2, sizes, Division(10, 1000, "given")).told(COUNTS, measured)
    known = shares(COUNTS)
    assert told["another_gb"]["activations"] == round(float(known[14] - known[10]), 4)
    assert told["another_gb"]["hits"] == 0.25
    assert told["another_gb"]["kv_s"] == 0.25 * 5000 / 100
    assert told["now"] == {"hot": 10, "experts_gb": 2.5, "kv_gb": 1.0, "by": "given"}


# an engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"), num_local_experts=8)


@pytest.fixture
def opened() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for each in made:
        each.bridge.close()
        each.experts.close()


def test_an_engine_divides_tells_and_divides_better_the_next_time(
    model: Path, tmp_path: Path, opened: list[Engine]
) -> None:
    counts = tmp_path / "counts.json"
    given = EngineConfig(
        model=model,
        threads=2,
        chunk_size=64,
        max_running=2,
        gpu_memory_gb=0.002,
        expert_statistics=counts,
    )
    opened.append(assemble(given))
    with TestClient(opened[0].app) as client:
        body = {"model": model.name, "prompt": list(range(3, 200)), "max_tokens": 4}
        for _ in range(3):
            assert client.post("/v1/completions", json=body).status_code == 200
        told = client.get("/experts").json()
        assert told["budget"]["now"]["by"] == "half each"
        assert 0 < told["hot"] < 24
        used = told["budget"]["now"]["experts_gb"] + told["budget"]["now"]["kv_gb"]
        assert 0.0019 < used <= 0.0021
        assert told["budget"]["better"]["by"] == "measured"
        assert {"activations", "hits", "experts_s", "kv_s"} == set(told["budget"]["another_gb"])
        metrics = client.get("/metrics").text
        assert 'kvc2_engine_experts_device_share{layer="0"}' in metrics
        assert 'kvc2_engine_another_gb{what="hits"}' in metrics
        shown = asking.experts(told, as_json=False)
        assert "another GB would bring" in shown
        assert client.post("/experts/save").status_code == 200
    assert json.loads(counts.read_text())["measured"]["prompt_tokens"] == 3 * 197
    opened.append(assemble(given))
    told = opened[1].experts.state()
    assert told["budget"]["now"]["by"] == "measured"

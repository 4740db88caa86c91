"""Experts for another framework: what it gets are the bits that the engine's own layers compute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import ModelConfig
from engine.experts import HybridExperts
from engine.experts.router import Routing
from engine.models import build_model, load_model
from engine.models.packed import open_packed
from engine.models.placed import moe_layers
from engine.weights import Checkpoint
from kvc2.errors import InvalidConfig, InvalidRequest
from tests import ROOT
from tests.doubles.checkpoints import make_mixtral, make_qwen3_moe

HIDDEN, EXPERTS = 48, 6
MEMORY_GB = 8.5 * 3 * 40 * HIDDEN * 4 / 1e9  # 8 experts
SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_gpu_experts": 2, "expert_placement_strategy": "random"},
    {"gpu_experts_ratio": 1.0},
    {"gpu_experts_ratio": 0.5, "enable_dynamic_expert_update": True},
    {"gpu_experts_ratio": 0.3, "expert_memory_gb": MEMORY_GB},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layer 1 has no experts."""
    return make_qwen3_moe(tmp_path_factory.mktemp("model"), mlp_only_layers=[1])


def call(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, 2)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_computes_what_the_model_computes(model_dir: Path, settings: dict[str, Any]) -> None:
    own = moe_layers(load_model(model_dir))
    with HybridExperts.from_checkpoint(model_dir, (2, 0), threads=2, **settings) as experts:
        for tokens in (1, 7, 200):
            hidden, ids, weights = call(tokens)
            for layer in experts.layers:
                made = experts.forward(hidden, ids, weights, layer=layer)
                assert torch.equal(made, own[layer].experts(hidden, Routing(ids, weights)))
        assert experts.layers == (0, 2)
        assert experts.counts.sum(1).tolist() == [416, 0, 416]


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_quantised_experts_are_those_of_an_engine(tmp_path: Path, settings: dict[str, Any]) -> None:
    model_dir = make_mixtral(tmp_path / "model", hidden_size=64, intermediate_size=64)
    config = ModelConfig.load(model_dir)
    with Checkpoint(model_dir, config.dtype) as checkpoint:
        packed = open_packed(config, checkpoint, "int8", None)
        own = moe_layers(build_model(config, checkpoint, packed))
    hidden = torch.randn(20, 64)
    routing = Routing(torch.randint(4, (20, 2)), torch.rand(20, 2))
    with HybridExperts.from_checkpoint(
        model_dir, 1, threads=2, expert_dtype="int8", **settings
    ) as experts:
        made = experts.forward(hidden, routing.expert_ids, routing.weights)
    assert torch.equal(made, own[1].experts(hidden, routing))


def test_numpy_in_is_numpy_out_and_any_dtype_comes_back(model_dir: Path) -> None:
    hidden, ids, weights = call(5)
    with HybridExperts.from_checkpoint(model_dir, 0, threads=1) as experts:
        expected = experts.forward(hidden, ids, weights)
        made = experts.forward(hidden.numpy(), ids.numpy().astype(np.int32), weights.numpy())
        assert isinstance(made, np.ndarray)
        assert np.array_equal(made, expected.numpy())
        half = hidden.to(torch.bfloat16)
        again = experts.forward(half, ids, weights)
        assert again.dtype == torch.bfloat16
        wide = experts.forward(half.float(), ids, weights)
        assert torch.equal(again, wide.to(torch.bfloat16))
        strided = np.asfortranarray(hidden.numpy().astype(np.float64))
        strided.flags.writeable = False
        assert experts.forward(strided, ids.numpy(), weights.numpy()).dtype == np.float64
        assert experts.forward(hidden[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_an_expert_of_anothers_adds_nothing(model_dir: Path, settings: dict[str, Any]) -> None:
    hidden, ids, weights = call(9)
    with HybridExperts.from_checkpoint(model_dir, 0, threads=2, **settings) as experts:
        absent, unweighed = ids.clone(), weights.clone()
        absent[:, 1], unweighed[:, 1] = -1, 0
        expected = experts.forward(hidden, ids, unweighed)
        assert torch.equal(experts.forward(hidden, absent, weights), expected)
        assert not torch.equal(experts.forward(hidden, ids, weights), expected)
        none = experts.forward(hidden, torch.full_like(ids, -1), weights)
        assert torch.equal(none, torch.zeros_like(expected))
        assert experts.counts.sum() == 9 * 5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden": torch.zeros(3, 5)}, "hidden"),
        ({"hidden": [[1.0]]}, "hidden"),
        ({"ids": torch.zeros(3, 2)}, "ids"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, "ids"),
        ({"ids": torch.full((3, 2), EXPERTS)}, "ids"),
        ({"ids": torch.full((3, 2), -2)}, "ids"),
        ({"weights": torch.zeros(3, 1)}, "weights"),
        ({"layer": 1}, "layer"),
    ],
    ids=str,
)
def test_what_can_not_be_computed_is_refused_by_name(
    model_dir: Path, change: dict[str, Any], field: str
) -> None:
    hidden, ids, weights = call(3)
    arguments = {"hidden": hidden, "ids": ids, "weights": weights} | change
    with (
        HybridExperts.from_checkpoint(model_dir, 0, threads=1) as experts,
        pytest.raises(InvalidRequest) as refused,
    ):
        experts.forward(**arguments)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        (1, {}, r"layers that have experts, of \[0, 2\]"),
        ([0, 3], {}, "layers that have experts"),
        ([], {}, "layers that have experts"),
        (0, {"num_gpu_expert": 1}, "num_gpu_experts"),
        (0, {"port": 1}, "port"),
        (0, {"gpu_experts_ratio": 2.0}, "gpu_experts_ratio"),
    ],
)
def test_what_can_not_be_read_is_refused(
    model_dir: Path, layer: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        HybridExperts.from_checkpoint(model_dir, layer, **settings)


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    text = (ROOT / "engine" / "experts" / "README.md").read_text()
    (tmp_path / "example.py").write_text(text.split("```python\n")[1].split("```")[0])
    model_dir = make_mixtral(tmp_path / "model")
    command = [sys.executable, str(tmp_path / "example.py"), str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"rows: (3, {HIDDEN})", "chosen: [1. 1. 1. 2.]"]

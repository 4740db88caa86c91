"""What config.json says and no weight shows divides the cache too; where the model lies doesn't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.identity import identity_of
from kvc2.namespace import named_by, namespace
from tests.doubles.checkpoints import make_qwen3_moe, weights_digest

SECRET = b"s" * 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_moe(tmp_path_factory.mktemp("model") / "first")


def space(model_dir: Path, dtype: str = "auto", page_size: int = 16, **fields: Any) -> bytes:
    config = ModelConfig.load(model_dir, dtype)
    identity = identity_of(config, weights_digest(model_dir), page_size, **fields)
    return namespace(SECRET, identity.encode())


def edited(model: Path, folder: Path, **fields: Any) -> Path:
    copy = Path(shutil.copytree(model, folder))
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return copy


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": 1},
        {"norm_topk_prob": True},
        {"rms_norm_eps": 1e-5},
        {"mlp_only_layers": [1]},
        {"decoder_sparse_step": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_an_edit_of_the_configuration_is_another_namespace(
    model: Path, tmp_path: Path, fields: Any
) -> None:
    assert space(edited(model, tmp_path / "edited", **fields)) != space(model)


def test_dtype_and_page_size_are_another_namespace(model: Path) -> None:
    assert len({space(model), space(model, "bfloat16"), space(model, page_size=32)}) == 3


def test_a_name_is_no_other_namespace(model: Path, tmp_path: Path) -> None:
    renamed = edited(
        model, tmp_path / "second", _name_or_path="other/name", transformers_version="0"
    )
    assert space(renamed) == space(model)


def test_kernels_that_give_other_bits_are_another_namespace(model: Path) -> None:
    assert len({space(model, numerics=each) for each in ("", "amx.2", "shared")}) == 3


def test_deferred_experts_are_another_namespace(model: Path) -> None:
    assert len({space(model, deferral=each) for each in (0, 1, 2)}) == 3


def test_the_model_is_found_where_version_1_of_identities_put_it(model: Path) -> None:
    """Every field was written then; `moe_layers` of each layer."""
    config = ModelConfig.load(model, "auto")
    encoded = identity_of(config, weights_digest(model), 16).encode()
    then = json.loads(named_by(encoded))
    assert "schema" not in then
    assert then["moe_layers"] == [int(each) for each in config.moe_layers]
    assert (then["attention"], then["windows"]) == ("full", [])
    assert len(then) == 24

"""Checkpoints are read by name and shape; their digest is that of the tensors, not of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.models import load_model
from engine.weights import Checkpoint
from tests.doubles.checkpoints import make_mixtral, reshard, weights_digest


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixtral(tmp_path_factory.mktemp("model"))


def changed(model_dir: Path, target_dir: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target_dir.mkdir()
    (target_dir / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    kept = load_file(model_dir / "model.safetensors") | tensors
    save_file(kept, target_dir / "model.safetensors")
    return target_dir


def test_a_changed_tensor_changes_the_digest(model_dir: Path, tmp_path: Path) -> None:
    norm = load_file(model_dir / "model.safetensors")["model.norm.weight"]
    norm[0] += 1e-6
    other = changed(model_dir, tmp_path / "other", {"model.norm.weight": norm})
    assert len(weights_digest(model_dir)) == 32
    assert weights_digest(other) != weights_digest(model_dir)


def test_a_changed_dtype_or_shape_of_the_same_bytes_changes_the_digest(tmp_path: Path) -> None:
    digests = set()
    zeros = torch.zeros(8, dtype=torch.float32)
    for index, tensor in enumerate([zeros, zeros.view(2, 4), zeros.view(torch.int32)]):
        directory = tmp_path / str(index)
        directory.mkdir()
        save_file({"x": tensor}, directory / "model.safetensors")
        digests.add(weights_digest(directory))
    assert len(digests) == 3


def test_renaming_and_resharding_keep_the_digest(model_dir: Path, tmp_path: Path) -> None:
    digest = weights_digest(model_dir)
    sharded = reshard(model_dir, tmp_path / "sharded", 3)
    assert weights_digest(sharded) == digest
    renamed = sharded.rename(tmp_path / "renamed")
    assert weights_digest(renamed) == digest


def test_a_tensor_that_is_missing_or_misshapen_is_named(model_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    bad = changed(model_dir, tmp_path / "bad", {name: torch.zeros(3, 5)})
    with pytest.raises(CheckpointError, match=name):
        load_model(bad)
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.nothing"):
        Checkpoint(model_dir, torch.float32).tensor("model.nothing", 1)


def test_an_index_never_leads_out_of_its_directory(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        weights_digest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        weights_digest(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(tmp_path, torch.float32)

"""Models whose experts are quantised: what they compute, and the file that a restart maps."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import packed_file
from engine.attention.base import KvPool, KvShape
from engine.batch import Batch, Slice
from engine.config import ModelConfig
from engine.identity import identity_of
from engine.models import build_model
from engine.models.base import Model
from engine.models.packed import FORMATS, PackedExperts, open_packed
from engine.models.placed import PlacedModel
from engine.packed_file import Draft, Made
from engine.runner import Runner
from engine.settings import EngineConfig
from engine.weights import Checkpoint
from kvc2.errors import InvalidConfig
from tests.doubles.checkpoints import fuse_experts, in_fp8, make_mixtral, make_qwen3_moe

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
# Largest distance of logits from bf16's, over their length, for these small models.
FAR = {"int8": 0.04, "int4": 0.25, "int4-group128": 0.3, "fp8": 0.08}
QUANTISED = pytest.mark.parametrize("expert_dtype", list(FAR))


def loaded(
    model_dir: Path, expert_dtype: str = "auto", kept: Path | None = None
) -> tuple[Model, PackedExperts | None]:
    config = ModelConfig.load(model_dir)
    with Checkpoint(model_dir, config.dtype) as checkpoint:
        packed = open_packed(config, checkpoint, expert_dtype, kept)
        return build_model(config, checkpoint, packed), packed


def logits(model: Model, wrap: Callable[[Runner], Any] = lambda runner: runner) -> torch.Tensor:
    """Of the last token, after all in one step."""
    shape = KvShape.of(model.config, 16)
    runner = wrap(Runner(model, KvPool(shape, 1, bytearray(shape.page_bytes))))
    whole = Slice(TOKENS, len(TOKENS), [0], True)
    found: torch.Tensor = runner.step(Batch.of([whole], 16))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of both architectures, experts stored one by one and fused."""
    folder = tmp_path_factory.mktemp("models")
    mixtral = make_mixtral(folder / "mixtral", torch.bfloat16)
    qwen = make_qwen3_moe(folder / "qwen", torch.bfloat16, mlp_only_layers=[1])
    return {
        "mixtral": mixtral,
        "qwen": qwen,
        "fused": fuse_experts(mixtral, folder / "fused"),
        "fp8": in_fp8(qwen, folder / "fp8"),
    }


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@QUANTISED
@pytest.mark.parametrize("name", ["mixtral", "qwen", "fused"])
def test_quantised_experts_compute_nearly_the_same(
    models: dict[str, Path], name: str, expert_dtype: str
) -> None:
    plain, packed = loaded(models[name], "bf16")
    assert packed is None
    assert plain.expert_format == ""
    model, _ = loaded(models[name], expert_dtype)
    assert 0 < distance(logits(model), logits(plain)) < FAR[expert_dtype]


def test_experts_stored_one_by_one_and_fused_have_the_same_bits(models: dict[str, Path]) -> None:
    one, fused = (loaded(models[name], "int4")[0] for name in ("mixtral", "fused"))
    assert torch.equal(logits(one), logits(fused))


def test_fp8_is_read_as_it_is_shipped(models: dict[str, Path]) -> None:
    """What bf16 makes of the same numbers is near; what is quantised again is the same."""
    shipped, packed = loaded(models["fp8"])
    assert packed is not None
    assert shipped.expert_format == "fp8_e4m3-block128x128"
    plain, none = loaded(models["fp8"], "bf16")
    assert none is None
    assert distance(logits(shipped), logits(plain)) < 0.01
    again, _ = loaded(models["fp8"], "int8")
    assert 0 < distance(logits(again), logits(plain)) < FAR["int8"]


def test_fp8_that_is_no_number_or_has_no_scales_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    for told in (f"{name} holds NaN", f"lacks the tensor {name}_scale_inv"):
        tensors = load_file(models["fp8"] / "model.safetensors")
        if told.startswith("lacks"):
            del tensors[f"{name}_scale_inv"]
        else:
            tensors[name].view(torch.uint8)[3, 3] = 0x7F
        folder = tmp_path / told[-5:]
        folder.mkdir()
        (folder / "config.json").write_bytes((models["fp8"] / "config.json").read_bytes())
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(Exception, match=told):
            loaded(folder)


@pytest.mark.parametrize(
    ("told", "field"),
    [
        ({"quant_method": "gptq"}, r"quant_method = 'gptq': only fp8.*--expert-dtype"),
        ({"quant_method": "awq"}, "quant_method = 'awq'"),
        ({"quant_method": "compressed-tensors"}, "quant_method = 'compressed-tensors'"),
        ({"weight_block_size": [64, 128]}, r"weight_block_size = \[64, 128\]"),
        ({"weight_block_size": None}, r"weight_block_size: must be \[128, 128\]"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static'"),
    ],
)
def test_other_quantised_checkpoints_are_refused_by_name(
    models: dict[str, Path], tmp_path: Path, told: dict[str, Any], field: str
) -> None:
    model_dir = in_fp8(models["qwen"], tmp_path / "model", **told)
    with pytest.raises(InvalidConfig, match=rf"quantization_config\.{field}"):
        ModelConfig.load(model_dir)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model_dir = make_mixtral(tmp_path / "model")
    tensors = load_file(model_dir / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][4, 4] = float("inf")
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(Exception, match=f"{name} holds NaN or infinity"):
        loaded(model_dir, "int8")


def test_each_format_is_another_identity(models: dict[str, Path]) -> None:
    config, digest = ModelConfig.load(models["qwen"]), b"d" * 32
    names = ["", *(format.name for format in FORMATS.values() if format is not None)]
    encoded = {identity_of(config, digest, 16, expert_format=name).encode() for name in names}
    assert len(encoded) == len(names) == 5
    assert identity_of(config, digest, 16).formats_digest == ""


@pytest.mark.parametrize("expert_dtype", ["int8", "int4", "fp8"])
def test_where_a_quantised_expert_lies_changes_no_bit(
    models: dict[str, Path], expert_dtype: str
) -> None:
    plain, _ = loaded(models["mixtral"], expert_dtype)
    config = EngineConfig(model=models["mixtral"], gpu_experts_ratio=0.5, threads=2)
    placed = PlacedModel(config, plain)
    try:
        assert torch.equal(logits(placed.model, placed.compute), logits(plain))
        placed.experts.between_steps(0.0)  # counts the step
        assert placed.state()["device_share"] > 0
    finally:
        placed.close()


def test_quantised_experts_are_not_split_over_nodes(models: dict[str, Path]) -> None:
    model, _ = loaded(models["mixtral"], "int8")
    config = EngineConfig(model=models["mixtral"], expert_nodes=2, threads=2)
    with pytest.raises(InvalidConfig, match=r"expert_nodes = 2: quantised experts are not split"):
        PlacedModel(config, model)


def test_experts_on_disk_are_stored_as_they_are_computed(models: dict[str, Path]) -> None:
    with pytest.raises(InvalidConfig, match=r"expert_dtype = 'int8': is not read from disk"):
        EngineConfig(model=models["mixtral"], expert_dtype="int8", expert_memory_gb=1)
    config = ModelConfig.load(models["fp8"])
    with (
        Checkpoint(models["fp8"], config.dtype, experts_on_disk=True) as checkpoint,
        pytest.raises(InvalidConfig, match="is not read from disk"),
    ):
        open_packed(config, checkpoint, "auto", None)


# ---- the file ----


@contextmanager
def no_warning(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        yield
    assert not caplog.records


@QUANTISED
def test_a_restart_maps_what_was_packed(
    models: dict[str, Path], tmp_path: Path, expert_dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with no_warning(caplog):
        first, made = loaded(models["qwen"], expert_dtype, tmp_path / "kept")
        expected = logits(first)
        again, mapped = loaded(models["qwen"], expert_dtype, tmp_path / "kept")
    assert made is not None
    assert mapped is not None
    assert (made.filled, mapped.filled) == (False, True)
    assert torch.equal(logits(again), expected)
    assert again.weights_digest == first.weights_digest
    (file,) = (tmp_path / "kept").glob("*.experts")
    assert file.stat().st_mode & 0o777 == 0o400


def test_formats_are_kept_beside_each_other(models: dict[str, Path], tmp_path: Path) -> None:
    for expert_dtype in FAR:
        loaded(models["mixtral"], expert_dtype, tmp_path)
    assert len(list(tmp_path.glob("*.experts"))) == len(FAR)
    for expert_dtype in FAR:
        _, packed = loaded(models["mixtral"], expert_dtype, tmp_path)
        assert packed is not None
        assert packed.filled


def test_a_file_of_other_weights_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_dir, kept = make_mixtral(tmp_path / "model"), tmp_path / "kept"
    loaded(model_dir, "int8", kept)
    make_mixtral(model_dir, initializer_range=0.1)
    fresh, _ = loaded(model_dir, "int8")
    found, packed = loaded(model_dir, "int8", kept)
    assert packed is not None
    assert not packed.filled
    assert "it has another source" in caplog.text
    assert torch.equal(logits(found), logits(fresh))
    _, packed = loaded(model_dir, "int8", kept)
    assert packed is not None
    assert packed.filled


LAYOUT = {"a": (3, 5000), "b": (2, 64)}
MADE = Made("00" * 32, "int8-channel", LAYOUT)


def kept_file(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = folder / "file"
    draft = Draft(path, LAYOUT)
    for tensor in draft.tensors.values():
        tensor.random_(256)
    draft.keep(MADE)
    return path, draft.tensors


def test_each_byte_of_a_file_counts(tmp_path: Path) -> None:
    """Whatever is changed or missing is found out; nothing raises."""
    path, tensors = kept_file(tmp_path)
    whole = path.read_bytes()
    found = packed_file.load(path, MADE)
    assert found is not None
    assert all(torch.equal(found[name], tensors[name]) for name in LAYOUT)
    damaged = tmp_path / "damaged"
    used = [*range(0, 15000, 997), *range(16384, 16384 + 128, 7), *range(20480, len(whole))]
    for at in used:
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert packed_file.load(damaged, MADE) is None, at
    for length in (0, 1, 31, 32, 4096, 20480, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        assert packed_file.load(damaged, MADE) is None, length
    damaged.write_bytes(whole + b"\\0")
    assert packed_file.load(damaged, MADE) is None
    assert packed_file.load(tmp_path / "missing", MADE) is None
    assert packed_file.load(tmp_path, MADE) is None


@pytest.mark.parametrize(
    "made",
    [
        Made("11" * 32, "int8-channel", LAYOUT),
        Made("00" * 32, "int4-group32", LAYOUT),
        Made("00" * 32, "int8-channel", LAYOUT | {"b": (1, 128)}),
        Made("00" * 32, "int8-channel", {"a": (3, 5000)}),
    ],
)
def test_a_file_of_something_else_is_not_used(tmp_path: Path, made: Made) -> None:
    path, _ = kept_file(tmp_path)
    assert packed_file.load(path, made) is None


def test_a_file_of_another_version_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = kept_file(tmp_path)
    monkeypatch.setattr(packed_file, "VERSION", packed_file.VERSION + 1)
    assert packed_file.load(path, MADE) is None


def test_a_file_that_is_not_kept_leaves_nothing(tmp_path: Path) -> None:
    Draft(tmp_path / "file", LAYOUT)
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_made_experts_are_packed_all_the_same(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("")
    plain, _ = loaded(models["mixtral"], "int8")
    found, _ = loaded(models["mixtral"], "int8", tmp_path / "taken" / "kept")
    assert torch.equal(logits(found), logits(plain))
    assert "packed experts can't be kept" in caplog.text


MEMORY = """
import sys
from pathlib import Path
from engine import packed_file
from engine.packed_file import Draft, Made

def used():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("Rss"))
    return sum(int(line.split()[0]) for line in lines.values()) * 1024

path, layout = Path(sys.argv[1]), {"a": (4, 16 << 20)}
made = Made("00" * 32, "int8-channel", layout)
before = used()
if sys.argv[2] == "make":
    draft = Draft(path, layout)
    for tensor in draft.tensors.values():
        tensor.fill_(7)
    draft.keep(made)
    tensors = draft.tensors
else:
    tensors = packed_file.load(path, made)
total = sum(int(tensor.max()) for tensor in tensors.values())
print(used() - before)
"""


def test_packed_experts_lie_in_memory_once(tmp_path: Path) -> None:
    """While they are made, and mapped by a restart: what both processes have is their size."""
    for how in ("make", "map"):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "file"), how]
        grown = int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
        assert 64 << 20 <= grown < 80 << 20, how

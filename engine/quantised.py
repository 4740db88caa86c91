"""Quantised weights: how one is stored, how it is made of floats, and the record that our kernels
read (csrc/experts/packed.h).

A record says of itself what it is, and is bytes to all else: whoever copies, maps or moves experts
needs to know its length alone. Not responsible for files (weights, packed_file), nor for products.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_MAGIC = 0x3157514B  # "KQW1"
_CODES = {"int8": 1, "int4": 2, "fp8": 3}
_HEAD = struct.Struct("<IBBxxIIII40x")
_LANES = 16  # rows of a block
_LINE = 64
INPUTS_MAX = 1 << 16  # sums of so many products of bytes fit into 32 bits
FP8_MAX = 448.0  # of e4m3fn
BLOCK = 128  # rows and inputs under one scale of fp8, as DeepSeek and Qwen ship it


@dataclass(frozen=True)
class Format:
    """How a weight is stored. `group`: inputs under one scale, 0: all of a row."""

    kind: Literal["int8", "int4", "fp8"]
    group: int = 0
    zeros: bool = False  # int4 with zero points

    @property
    def name(self) -> str:
        """As the identity of a model says it."""
        if self.kind == "int8":
            return "int8-channel"
        if self.kind == "fp8":
            return f"fp8_e4m3-block{BLOCK}x{BLOCK}"
        return f"int4-group{self.group}" + "-zeros" * self.zeros

    def shape(self, parts: int, rows: int, inputs: int) -> Record:
        """Of a record. Raises ValueError for more inputs than the kernels add exactly."""
        if inputs > INPUTS_MAX:
            raise ValueError(f"{inputs} inputs of a quantised weight: {INPUTS_MAX} is the most")
        return Record(self, parts, rows, inputs)


INT8 = Format("int8")
INT4 = Format("int4", 32)
INT4_GROUP128 = Format("int4", 128)
FP8 = Format("fp8", BLOCK)


@dataclass(frozen=True)
class Quantised:
    """One matrix: scales * (values - zeros), a scale for each row and group of inputs."""

    values: Tensor  # uint8 [rows, inputs]: bytes around 128, nibbles, or codes of e4m3fn
    scales: Tensor  # float32 [rows, groups]
    zeros: Tensor | None = None  # uint8 [rows, groups]


@dataclass(frozen=True)
class Record:
    """Bytes for `parts` matrices [rows, inputs] of one format: gate and up are two."""

    format: Format
    parts: int
    rows: int
    inputs: int

    @property
    def num_bytes(self) -> int:
        return self._zeros_at + (_whole(self._scales) if self.format.zeros else 0)

    def write(self, matrices: Sequence[Quantised], into: Tensor) -> None:
        """Into uint8 [num_bytes]."""
        code, group = _CODES[self.format.kind], self._group
        head = _HEAD.pack(
            _MAGIC, code, self.format.zeros, self.parts, self.rows, self.inputs, group
        )
        into[:_LINE] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        values = into[_LINE : self._scales_at].view(self.parts, -1)
        scale_type = torch.bfloat16 if self.format.kind == "int4" else torch.float32
        end = self._scales_at + self._scales * scale_type.itemsize
        scales = into[self._scales_at : end].view(scale_type).view(self.parts, -1)
        zeros = into[self._zeros_at : self._zeros_at + self._scales].view(self.parts, -1)
        for part, matrix in enumerate(matrices):
            self._write_values(matrix.values, values[part])
            self._write_scales(matrix.scales, scales[part])
            if matrix.zeros is not None:
                self._write_scales(matrix.zeros, zeros[part])

    @property
    def _group(self) -> int:
        return self.format.group or -(-self.inputs // 8) * 8

    @property
    def _blocks(self) -> int:
        return -(-self.rows // _LANES)

    @property
    def _lines(self) -> int:
        """Of a block."""
        return -(-self.inputs // (8 if self.format.kind == "int4" else 4))

    @property
    def _scales(self) -> int:
        return self.parts * self._blocks * -(-self.inputs // self._group) * _LANES

    @property
    def _scales_at(self) -> int:
        return _LINE + self.parts * self._blocks * self._lines * _LINE

    @property
    def _zeros_at(self) -> int:
        return self._scales_at + _whole(self._scales * (2 if self.format.kind == "int4" else 4))

    def _write_values(self, values: Tensor, into: Tensor) -> None:
        nibbles = self.format.kind == "int4"
        missing = self._lines * (8 if nibbles else 4) - self.inputs
        padded = torch.nn.functional.pad(values, (0, missing, 0, self._blocks * 16 - self.rows))
        if nibbles:
            halves = padded.view(self._blocks * _LANES, self._lines, 2, 4)
            padded = halves[:, :, 0] | halves[:, :, 1] << 4
        rows = padded.view(self._blocks, _LANES, self._lines, 4)
        into.view(self._blocks, self._lines, _LANES, 4).copy_(rows.transpose(1, 2))

    def _write_scales(self, scales: Tensor, into: Tensor) -> None:
        padded = torch.nn.functional.pad(scales, (0, 0, 0, self._blocks * 16 - self.rows))
        rows = padded.view(self._blocks, _LANES, -1)
        into.view(self._blocks, -1, _LANES).copy_(rows.transpose(1, 2))


def _whole(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


def quantise(weight: Tensor, format: Format) -> Quantised:
    """Of floats [rows, inputs]: the largest of each group, or block, decides its scale."""
    wide = weight.float()
    if format.kind == "fp8":
        return _fp8(wide)
    if format.kind == "int8":
        scales = wide.abs().amax(1, keepdim=True) / 127
        values = wide * _inverse(scales)
        return Quantised(values.round_().add_(128).to(torch.uint8), scales)
    rows, inputs = wide.shape
    groups = torch.nn.functional.pad(wide, (0, -inputs % format.group))
    groups = groups.view(rows, -1, format.group)
    values, scales, zeros = _with_zeros(groups) if format.zeros else _symmetric(groups)
    return Quantised(values.view(rows, -1)[:, :inputs], scales, zeros)


def _symmetric(groups: Tensor) -> tuple[Tensor, Tensor, None]:
    """The largest becomes -8; then the scale is that which leaves the least squared error."""
    least, most = groups.amin(2), groups.amax(2)
    largest = torch.where(-least > most, least, most)
    numbers = (groups * _inverse(largest / -8).unsqueeze(2)).round_().clamp_(-8, 7)
    squares = numbers.square().sum(2)
    scales = (groups * numbers).sum(2) * _inverse(squares)
    return numbers.add_(8).to(torch.uint8), scales, None


def _with_zeros(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the least to the largest, zero among them."""
    least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((most - least) / 15).bfloat16().float()  # as it is stored
    inverse = _inverse(scales)
    zeros = (-least * inverse).round_().clamp_(0, 15)
    values = (groups * inverse.unsqueeze(2)).round_() + zeros.unsqueeze(2)
    return values.clamp_(0, 15).to(torch.uint8), scales, zeros.to(torch.uint8)


def _fp8(wide: Tensor) -> Quantised:
    rows, inputs = wide.shape
    padded = torch.nn.functional.pad(wide, (0, -inputs % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scales = blocks.abs().amax((1, 3)) / FP8_MAX  # [blocks of rows, groups]
    numbers = blocks * _inverse(scales)[:, None, :, None]
    codes = numbers.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return Quantised(codes.view(padded.shape)[:rows, :inputs], of_blocks(scales, rows))


def of_blocks(scales: Tensor, rows: int) -> Tensor:
    """Scales of blocks [blocks of rows, groups] for each row."""
    return scales.repeat_interleave(BLOCK, 0)[:rows]


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, 1 / scales)


def floats(matrix: Quantised, format: Format) -> Tensor:
    """What a quantised matrix stands for, float32 [rows, inputs]."""
    inputs = matrix.values.shape[1]
    if format.kind == "fp8":
        numbers = matrix.values.view(torch.float8_e4m3fn).float()
    elif matrix.zeros is not None:
        numbers = matrix.values.float() - _spread(matrix.zeros, format, inputs)
    else:
        numbers = matrix.values.float() - (8 if format.kind == "int4" else 128)
    return numbers * _spread(matrix.scales, format, inputs)


def _spread(scales: Tensor, format: Format, inputs: int) -> Tensor:
    """One for each input."""
    return scales.float().repeat_interleave(format.group or inputs, 1)[:, :inputs]

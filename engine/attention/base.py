"""The paged KV pool and the contract of attention over it.

Not responsible for who owns a page, or when its content is ready (runner, prefix).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Buffer

from engine.batch import Batch
from engine.config import ModelConfig
from kvc2.errors import InvalidConfig


@dataclass(frozen=True)
class KvShape:
    """What one page holds: `page_size` tokens' K and V of every layer."""

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int  # tokens, a power of two from 1 to 512
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, page_size: int) -> KvShape:
        """Raises InvalidConfig for a page size that isn't a power of two up to 512."""
        if not 1 <= page_size <= 512 or page_size & (page_size - 1):
            raise InvalidConfig("attn.page_size", page_size, "must be a power of two from 1 to 512")
        return cls(config.num_layers, config.kv_heads, config.head_dim, page_size, config.dtype)

    @property
    def segment_bytes(self) -> int:
        """Of one page's K, or V, of one layer."""
        return self.kv_heads * self.page_size * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return 2 * self.layers * self.segment_bytes


class KvPool:
    """Typed views of a flat memory of `num_pages` pages, layer-major: for each layer the K of all
    pages, then the V of all pages; one page's K is [kv_heads, page_size, head_dim]. side_by_side:
    for each layer all pages, of each its K and then its V.

    Shares the memory, which must be writable, and outlive the pool; copies nothing.
    """

    def __init__(
        self,
        shape: KvShape,
        num_pages: int,
        memory: Tensor | Buffer,
        *,
        side_by_side: bool = False,
    ) -> None:
        flat = memory if isinstance(memory, Tensor) else torch.frombuffer(memory, dtype=torch.uint8)
        wanted = num_pages * shape.page_bytes
        if flat.dtype != torch.uint8 or flat.dim() != 1 or flat.numel() < wanted:
            raise ValueError(f"memory: {wanted} bytes are needed, flat uint8, got {flat.shape}")
        self.shape = shape
        self.num_pages = num_pages
        page = (shape.kv_heads, shape.page_size, shape.head_dim)
        typed = flat[:wanted].view(shape.dtype)
        if side_by_side:
            parts = typed.view(shape.layers, num_pages, 2, *page).transpose(1, 2)
        else:
            parts = typed.view(shape.layers, 2, num_pages, *page)
        self._parts = parts

    @property
    def device(self) -> torch.device:
        """Where the memory lies."""
        return self._parts.device

    def key(self, layer: int) -> Tensor:
        """[num_pages, kv_heads, page_size, head_dim], a view."""
        return self._parts[layer, 0]

    def value(self, layer: int) -> Tensor:
        """[num_pages, kv_heads, page_size, head_dim], a view."""
        return self._parts[layer, 1]

    def pages(self, layer: int) -> Tensor:
        """[2, num_pages, kv_heads, page_size, head_dim], K then V, a view."""
        return self._parts[layer]


class Attention(ABC):
    """Writes a step's K and V into pages and attends to them. One step at a time.

    `plan` first, once a step; then for each layer `write`, then `attend`. Query heads
    [g * n, (g + 1) * n) share KV head g, n = query heads / KV heads. Scores are scaled by
    1 / sqrt(head_dim); a token sees its own position and the ones before it, of its own sequence.
    """

    def __init__(self, pool: KvPool, query_heads: int) -> None:
        self.pool = pool
        self.query_heads = query_heads
        self.scale = 1.0 / math.sqrt(pool.shape.head_dim)

    @abstractmethod
    def plan(self, batch: Batch) -> None:
        """Prepares what all layers of the step share."""

    def captured(self, rows: int) -> Attention | None:
        """Another one over the same pool, for steps of so many decodes: its plans always lie at the
        same addresses, so that a graph may hold what reads them. None: there is none."""
        return None

    def holds(self, batch: Batch) -> bool:
        """Whether `plan` takes these decodes; further ones that pad them always fit."""
        return True

    @abstractmethod
    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Puts [T, kv_heads, head_dim] of K and V into the pages of the step's tokens."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor) -> Tensor:
        """[T, query_heads, head_dim] of queries -> the same shape of outputs."""

"""A rank's side: copies between vLLM's KV and the daemon's arena, or the staging pages.

Not here: which blocks (scheduler.py). What can't be loaded is reported, and vLLM computes it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core, errors
from kvc2.answers import U32, U64
from kvc2.client import ArenaView, SharedPool
from kvc2.integrations.vllm.messages import Caches, Load, Save, Step

log = logging.getLogger(__name__)
T = TypeVar("T", Load, Save)

COPY_THREADS = 2
RING_BLOCKS = 64  # that a device's copies gather at a time


@dataclass(frozen=True)
class Rank:
    """Of tensor parallelism: which of `parts` it holds, and whether it is the first that does."""

    part: int
    first: bool

    @staticmethod
    def of(rank: int, ranks: int, heads: int) -> Rank:
        """More ranks than heads: several hold the same ones."""
        parts = min(ranks, heads)
        part = rank * parts // ranks
        return Rank(part, rank == 0 or (rank - 1) * parts // ranks != part)


class LayerBlocks(Protocol):
    """The blocks of one layer, [blocks, bytes]."""

    def load(self, arena: ArenaView, offsets: U64, blocks: U32) -> bool:
        """Fill blocks from payloads at these bytes of the arena. False: its session is over."""

    def save(self, blocks: U32, memory: memoryview, offsets: U64) -> None:
        """Copy blocks to these bytes of memory."""


class HostBlocks:
    """Of a tensor in this process's memory: the copies are the client's own, without torch."""

    def __init__(self, rows: NDArray[np.uint8], team: _core.ThreadTeam) -> None:
        self._rows = rows
        size = rows.shape[1]
        self._segments = np.array([[0, rows.strides[0], size]], np.uint64)
        length = (rows.shape[0] - 1) * rows.strides[0] + size
        self._memory = np.lib.stride_tricks.as_strided(rows, (length,), (1,)).data
        self._team = team

    def load(self, arena: ArenaView, offsets: U64, blocks: U32) -> bool:
        return arena.scatter(offsets, self._memory, self._segments, blocks)

    def save(self, blocks: U32, memory: memoryview, offsets: U64) -> None:
        _core.gather(self._team, self._memory, self._segments, blocks, memory, offsets)


class DeviceBlocks:
    """Of a tensor on a device: by a ring of rows in host memory, pinned where there is CUDA. Not
    run on a GPU yet; the tests run it with tensors of the CPU."""

    def __init__(self, rows: Any, torch: Any, team: _core.ThreadTeam) -> None:
        self._rows, self._torch, self._team = rows, torch, team
        self._size = int(rows.shape[1])
        pinned = rows.device.type == "cuda"
        self._ring = torch.empty((RING_BLOCKS, self._size), dtype=torch.uint8, pin_memory=pinned)
        self._memory = self._ring.numpy().reshape(-1).data
        self._segments = np.array([[0, self._size, self._size]], np.uint64)

    def load(self, arena: ArenaView, offsets: U64, blocks: U32) -> bool:
        whole = True
        for begin in range(0, len(blocks), RING_BLOCKS):
            part = blocks[begin : begin + RING_BLOCKS]
            rows = np.arange(len(part), dtype=np.uint32)
            at = offsets[begin : begin + RING_BLOCKS]
            whole = arena.scatter(at, self._memory, self._segments, rows) and whole
            self._rows[self._index(part)] = self._ring[: len(part)].to(self._rows.device)
            self._synchronize()
        return whole

    def save(self, blocks: U32, memory: memoryview, offsets: U64) -> None:
        for begin in range(0, len(blocks), RING_BLOCKS):
            part = blocks[begin : begin + RING_BLOCKS]
            self._ring[: len(part)].copy_(self._rows[self._index(part)])
            self._synchronize()
            rows = np.arange(len(part), dtype=np.uint32)
            at = offsets[begin : begin + RING_BLOCKS]
            _core.gather(self._team, self._memory, self._segments, rows, memory, at)

    def _index(self, blocks: NDArray[np.uint32]) -> Any:
        return self._torch.from_numpy(blocks.astype(np.int64)).to(self._rows.device)

    def _synchronize(self) -> None:
        if self._rows.device.type == "cuda":
            self._torch.cuda.current_stream().synchronize()


def layers_in_order(names: Sequence[str]) -> list[str]:
    """By the number in a layer's name, as vLLM writes them."""

    def key(name: str) -> tuple[int, str]:
        found = re.search(r"\.(\d+)\.", name)
        return (int(found[1]) if found else -1, name)

    return sorted(names, key=key)


def caches_of(tensors: Sequence[Any]) -> Caches:
    """How they lie. Raises InvalidConfig for blocks that are not dense, one after the other."""
    axes = {_axes(each) for each in tensors}
    dtypes = {str(each.dtype).removeprefix("torch.") for each in tensors}
    if len(axes) != 1 or len(dtypes) != 1:
        raise errors.InvalidConfig("kv caches", f"{axes}, {dtypes}", "of one order and one dtype")
    sizes = tuple(_block_bytes(each) for each in tensors)
    return Caches(sizes, axes.pop(), dtypes.pop())


def _axes(tensor: Any) -> tuple[int, ...]:
    strides = list(tensor.stride())
    return tuple(sorted(range(len(strides)), key=lambda axis: -strides[axis]))


def _block_bytes(tensor: Any) -> int:
    size = int(tensor[0].numel())
    inner = sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
    dense, expected = True, 1
    for stride, length in inner:
        dense = dense and (length == 1 or stride == expected)
        expected *= length
    if not dense or tensor.stride(0) < size:
        shown = f"shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())}"
        raise errors.InvalidConfig("kv cache", shown, "blocks that are dense, one after the other")
    return size * int(tensor.element_size())


def rows_of(tensor: Any, torch: Any) -> Any:
    """[blocks, bytes] uint8 over the same memory."""
    flat = tensor.as_strided((tensor.shape[0], tensor[0].numel()), (tensor.stride(0), 1))
    return flat.view(torch.uint8)


class WorkerSide:
    """Called by the one thread of a rank that runs steps."""

    def __init__(self, rank: Rank, torch: Any, *, device_copies: bool | None = None) -> None:
        """device_copies None: for tensors that aren't in host memory."""
        self._rank = rank
        self._torch = torch
        self._device_copies = device_copies
        self._team = _core.ThreadTeam(COPY_THREADS)
        self._layers: list[LayerBlocks] = []
        self._pool: SharedPool | None = None
        self._arena: tuple[int, ArenaView] | None = None
        self._copies = ThreadPoolExecutor(1, "kvc2-load")
        self._loading: dict[str, Future[None]] = {}
        self._failed: set[int] = set()
        self._saved: dict[int, int] = {}
        self.caches: Caches | None = None

    def register(self, tensors: Mapping[str, Any]) -> None:
        """vLLM's KV, a tensor [blocks, ...] for each layer. Raises InvalidConfig."""
        ordered = [tensors[name] for name in layers_in_order(list(tensors))]
        self.caches = caches_of(ordered)
        self._layers = [self._blocks_of(each) for each in ordered]

    def _blocks_of(self, tensor: Any) -> LayerBlocks:
        rows = rows_of(tensor, self._torch)
        on_device = tensor.device.type != "cpu"
        if on_device if self._device_copies is None else self._device_copies:
            return DeviceBlocks(rows, self._torch, self._team)
        return HostBlocks(rows.numpy(), self._team)

    # ---- loads

    def load(self, step: Step) -> None:
        """At once, or beside the step where the step says so."""
        for each in step.loads:
            if step.asynchronous:
                self._loading[each.request_id] = self._copies.submit(self._load, step, each)
            else:
                self._load(step, each)

    def _load(self, step: Step, load: Load) -> None:
        if not self._tried(self._copy_in, step, load):
            self._failed.update(load.blocks.tolist())

    def _copy_in(self, step: Step, load: Load) -> bool:
        arena = self._arena_of(step, load.session)
        whole = True
        within = step.record.offsets(self._rank.part)
        for layer, begin in zip(self._layers, within, strict=True):
            whole = layer.load(arena, load.offsets + np.uint64(begin), load.blocks) and whole
        return whole

    def _arena_of(self, step: Step, session: int) -> ArenaView:
        if self._arena is None or self._arena[0] != session:
            self._arena = None  # a dead daemon's memory goes with its last view
            self._arena = (session, self._opened(step).arena(session, COPY_THREADS))
        return self._arena[1]

    def loaded(self) -> set[str]:
        """Requests whose loads beside a step have ended since they were last told."""
        ended = {request for request, future in self._loading.items() if future.done()}
        for request in ended:
            del self._loading[request]
        return ended

    def failed(self) -> set[int]:
        """vLLM's blocks that did not come since they were last told."""
        failed, self._failed = self._failed, set()
        return failed

    # ---- saves

    def save(self, step: Step) -> None:
        """Into the staging pages, of a part that no other rank saves."""
        for each in step.saves:
            done = not self._rank.first or self._tried(self._copy_out, step, each)
            self._saved[each.number] = int(done)

    def _copy_out(self, step: Step, save: Save) -> bool:
        memory, record = self._opened(step).map, step.record
        pages = save.pages.astype(np.uint64) * np.uint64(record.num_bytes)
        for layer, begin in zip(self._layers, record.offsets(self._rank.part), strict=True):
            layer.save(save.blocks, memory, pages + np.uint64(begin))
        return True

    def saved(self) -> dict[int, int]:
        """1 for each save that was done, 0 for one that failed, since they were last told."""
        saved, self._saved = self._saved, {}
        return saved

    def close(self) -> None:
        self._copies.shutdown(wait=True)
        self._arena = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _opened(self, step: Step) -> SharedPool:
        if self._pool is None:
            self._pool = step.share.open()
        return self._pool

    def _tried(self, copy: Callable[[Step, T], bool], step: Step, what: T) -> bool:
        """A fault is a miss: no step fails for a copy."""
        try:
            return copy(step, what)
        except (errors.Kvc2Error, OSError, IndexError, ValueError) as error:
            log.warning("kvc2: a copy failed (%s): %s", type(what).__name__, error)
            return False

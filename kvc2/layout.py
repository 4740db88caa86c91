"""How a page lies in a pool: segments in canonical order, what they sum to, and slab shapes.

Not here: who owns a page (csrc/index), and copying (csrc/copy). Client and daemon both use this.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.v1 import cache_pb2

LAYOUT_VERSION = 1
PAGE_SIZE_MAX = 512  # tokens of a block fit the header sector
HEADER_BYTES = 4096  # one sector before each payload (csrc/block)
ALIGNMENT = 4096  # O_DIRECT: payloads are padded to it
SEGMENTS_MAX = 4096  # 2,048 layers of key and value: a limit against forged layouts
SEGMENT_BYTES_MAX = 1 << 30
SPLIT, REPLICATED = 0, 1  # Segment.sharing
SLAB_TAIL_MAX = 0.05  # of a slab that no page uses


@dataclass(frozen=True)
class Segment:
    """Number `kv` (of full attention 0 key, 1 value) of one layer: page p lies at [offset + p *
    stride, + bytes). `sharing`: between parts of a component it is SPLIT, each has its heads, or
    REPLICATED, each has all of it."""

    layer: int
    kv: int
    bytes: int
    offset: int
    stride: int
    sharing: int = SPLIT


@dataclass(frozen=True)
class Layout:
    """Segments in canonical order: by layer from 0, in a layer from 0. Raises InvalidRequest.

    Layers need not be alike. Offsets and strides say where pages lie in one engine's pool and are
    no part of `digest`.
    """

    segments: tuple[Segment, ...]
    page_size: int
    layout_version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        check_page_size("layout.page_size", self.page_size)
        if self.layout_version != LAYOUT_VERSION:
            raise errors.InvalidRequest("layout.layout_version", self.layout_version, "1")
        self._check_segments()

    def _check_segments(self) -> None:
        count = len(self.segments)
        if not 1 <= count <= SEGMENTS_MAX:
            raise errors.InvalidRequest("layout.segments", count, f"1 to {SEGMENTS_MAX} of them")
        nexts = {(0, 0)}  # what may come
        for index, each in enumerate(self.segments):
            name = f"layout.segments[{index}]"
            if (each.layer, each.kv) not in nexts:
                raise errors.InvalidRequest(
                    f"{name}.layer, kv",
                    (each.layer, each.kv),
                    "in order, without a gap: layers from 0, and in each of them from 0",
                )
            nexts = {(each.layer, each.kv + 1), (each.layer + 1, 0)}
            if each.sharing not in (SPLIT, REPLICATED):
                raise errors.InvalidRequest(
                    f"{name}.sharing", each.sharing, "0 (split) or 1 (replicated)"
                )
            if not 1 <= each.bytes <= SEGMENT_BYTES_MAX:
                raise errors.InvalidRequest(
                    f"{name}.bytes", each.bytes, f"1 to {SEGMENT_BYTES_MAX}"
                )
            if each.stride < each.bytes:
                raise errors.InvalidRequest(f"{name}.stride", each.stride, f">= {each.bytes}")

    @property
    def layers(self) -> int:
        return self.segments[-1].layer + 1

    def layer_ends(self) -> NDArray[np.uint32]:
        """[layers] how many segments there are up to the end of each layer."""
        counts = np.bincount([each.layer for each in self.segments])
        return np.cumsum(counts).astype(np.uint32)

    @cached_property
    def row_bytes(self) -> int:
        """The fewest bytes of a page that lie side by side in the pool's memory: segments that
        follow one another at one stride are one row."""
        rows: list[int] = []
        end, stride = -1, 0  # of the segment before
        for each in sorted(self.segments, key=lambda segment: segment.offset):
            if each.offset == end and each.stride == stride >= rows[-1] + each.bytes:
                rows[-1] += each.bytes
            else:
                rows.append(each.bytes)
            end, stride = each.offset + each.bytes, each.stride
        return min(rows)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes over what makes two payloads interchangeable (SHA-256, little-endian u64s). The
        zeros and the one are a component's and its part's numbers, as long as there is one."""
        numbers = [self.layout_version, self.page_size, 0, 0, 1]
        for each in self.segments:
            # a split segment's is as it was before segments could be replicated
            numbers += [each.layer, each.kv | each.sharing << 32, each.bytes]
        packed = struct.pack(f"<{len(numbers)}Q", *numbers)
        return hashlib.sha256(b"kvc2.layout\0" + packed).digest()

    @cached_property
    def payload_bytes(self) -> int:
        """KV of one block: its segments one after the other."""
        return sum(each.bytes for each in self.segments)

    @cached_property
    def page_bytes(self) -> int:
        """A page in arena and slab file: header sector, then the payload padded to 4096."""
        return HEADER_BYTES + -(-self.payload_bytes // ALIGNMENT) * ALIGNMENT

    def segment_table(self) -> NDArray[np.uint64]:
        """[segments, 3] (offset, stride, bytes), as _core.gather and _core.scatter take them."""
        rows = [(each.offset, each.stride, each.bytes) for each in self.segments]
        return np.array(rows, dtype=np.uint64).reshape(-1, 3)

    def check_fits(self, num_pages: int, memory_bytes: int) -> None:
        """Raises InvalidRequest when a page of a pool would lie outside of its memory, or when two
        pages would overlap: a forged layout could make one block's copy spoil another's."""
        spans = []
        for index, each in enumerate(self.segments):
            end = each.offset + (num_pages - 1) * each.stride + each.bytes
            if end > memory_bytes:
                raise errors.InvalidRequest(
                    f"layout.segments[{index}]",
                    f"pages end at byte {end}",
                    f"within memory_bytes = {memory_bytes}",
                )
            spans.append((each.offset, end, each.stride, each.bytes, index))
        self._check_apart(sorted(spans))

    def _check_apart(self, spans: list[tuple[int, int, int, int, int]]) -> None:
        """Segments whose spans overlap must interleave, as the K and V of each page do where they
        lie side by side, or all segments where a page is one contiguous record."""
        groups: list[list[tuple[int, int, int, int, int]]] = []
        end = -1
        for span in spans:
            if span[0] >= end:
                groups.append([])
            groups[-1].append(span)
            end = max(end, span[1])
        if not all(_interleave(group) for group in groups):
            raise errors.InvalidRequest("layout.segments", "overlap", "pages that lie apart")

    def to_proto(self) -> cache_pb2.Layout:
        return cache_pb2.Layout(
            segments=[
                cache_pb2.Segment(
                    layer=each.layer,
                    kv=each.kv,
                    bytes=each.bytes,
                    offset=each.offset,
                    stride=each.stride,
                    sharing=each.sharing,
                )
                for each in self.segments
            ],
            page_size=self.page_size,
            layout_version=self.layout_version,
            row_bytes=self.row_bytes,
        )

    @staticmethod
    def from_proto(message: cache_pb2.Layout) -> Layout:
        """Raises InvalidRequest with the field's name."""
        layout = Layout(
            segments=tuple(
                Segment(each.layer, each.kv, each.bytes, each.offset, each.stride, each.sharing)
                for each in message.segments[: SEGMENTS_MAX + 1]
            ),
            page_size=message.page_size,
            layout_version=message.layout_version,
        )
        if message.row_bytes not in (0, layout.row_bytes):
            raise errors.InvalidRequest(
                "layout.row_bytes", message.row_bytes, f"as its segments lie: {layout.row_bytes}"
            )
        return layout


def _interleave(spans: list[tuple[int, int, int, int, int]]) -> bool:
    """Whether segments, by their offsets, have one stride and lie apart inside of it."""
    same = len({stride for _, _, stride, _, _ in spans}) == 1
    inside = spans[-1][0] + spans[-1][3] - spans[0][0] <= spans[0][2]
    return same and inside and all(a[0] + a[3] <= b[0] for a, b in itertools.pairwise(spans))


def layer_major(layers: int, num_pages: int, *, segment_bytes: int, page_size: int) -> Layout:
    """The layout of an engine's pool: for each layer the keys of all pages, then the values.

    One key (or value) page is [kv_heads, page_size, head_size], contiguous: segment_bytes of it.
    """
    segments = [
        Segment(
            layer, kv, segment_bytes, (2 * layer + kv) * num_pages * segment_bytes, segment_bytes
        )
        for layer in range(layers)
        for kv in (0, 1)
    ]
    return Layout(tuple(segments), page_size)


def side_by_side(layers: int, num_pages: int, *, segment_bytes: int, page_size: int) -> Layout:
    """The layout of an engine's pool on a device: for each layer all pages, of each its key and
    then its value. Rows of a copy are twice as long then, for which a bus is faster."""
    segments = [
        Segment(
            layer,
            kv,
            segment_bytes,
            2 * layer * num_pages * segment_bytes + kv * segment_bytes,
            2 * segment_bytes,
        )
        for layer in range(layers)
        for kv in (0, 1)
    ]
    return Layout(tuple(segments), page_size)


def check_page_size(field: str, page_size: int) -> None:
    """Raises InvalidRequest unless it is a power of two from 1 to PAGE_SIZE_MAX."""
    if not (1 <= page_size <= PAGE_SIZE_MAX and page_size & (page_size - 1) == 0):
        raise errors.InvalidRequest(field, page_size, f"a power of two from 1 to {PAGE_SIZE_MAX}")


def block_size(engine_block: int) -> int:
    """The tokens of a block of ours for an engine whose blocks have so many: the largest power of
    two that divides it, at most PAGE_SIZE_MAX. A block of the engine's is then several of ours."""
    if engine_block < 1:
        raise errors.InvalidRequest("engine_block", engine_block, "at least 1 token")
    return min(engine_block & -engine_block, PAGE_SIZE_MAX)


@dataclass(frozen=True)
class SlabShape:
    slab_bytes: int
    pages_per_slab: int


def slab_shape(page_bytes: int, slab_bytes: int) -> SlabShape:
    """The smallest multiple of slab_bytes of which pages of page_bytes leave at most 5 % unused."""
    fits = -(-page_bytes // slab_bytes)  # the first that holds a page
    for multiple in range(max(1, fits), page_bytes * 20 // slab_bytes + 2):
        size = multiple * slab_bytes
        pages = size // page_bytes
        if pages and size - pages * page_bytes <= SLAB_TAIL_MAX * size:
            return SlabShape(size, pages)
    raise errors.InvalidRequest("page_bytes", page_bytes, "at least 1")

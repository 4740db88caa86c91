"""Layouts: what may be mapped, and what makes two payloads interchangeable."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvc2.errors import InvalidRequest
from kvc2.layout import (
    PAGE_SIZE_MAX,
    REPLICATED,
    Layout,
    Segment,
    block_size,
    check_page_size,
    layer_major,
    side_by_side,
    slab_shape,
)
from kvc2.v1 import cache_pb2


def test_a_layer_major_pool_is_filled_to_its_last_byte() -> None:
    found = layer_major(3, 10, segment_bytes=256, page_size=16)
    assert found.payload_bytes == 6 * 256
    assert found.page_bytes == 4096 + 4096
    assert (found.layers, found.layer_ends().tolist()) == (3, [2, 4, 6])
    found.check_fits(10, 6 * 10 * 256)
    with pytest.raises(InvalidRequest, match=r"segments\[5\]"):
        found.check_fits(10, 6 * 10 * 256 - 1)
    assert found.segment_table()[1].tolist() == [10 * 256, 256, 256]


def test_the_digest_is_of_content_not_of_place() -> None:
    digests = {
        layer_major(3, pages, segment_bytes=256, page_size=16).digest for pages in (1, 10, 99)
    }
    assert len(digests) == 1
    others = [
        layer_major(2, 10, segment_bytes=256, page_size=16),
        layer_major(3, 10, segment_bytes=512, page_size=16),
        layer_major(3, 10, segment_bytes=256, page_size=32),
    ]
    assert len({each.digest for each in others} | digests) == 4


def test_a_layout_survives_the_wire() -> None:
    found = layer_major(3, 10, segment_bytes=256, page_size=16)
    assert (
        Layout.from_proto(cache_pb2.Layout.FromString(found.to_proto().SerializeToString()))
        == found
    )


GOOD = layer_major(2, 4, segment_bytes=64, page_size=16)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"page_size": 0}, "layout.page_size"),
        ({"page_size": 48}, "layout.page_size"),
        ({"page_size": 1024}, "layout.page_size"),
        ({"layout_version": 2}, "layout.layout_version"),
        ({"segments": ()}, "layout.segments"),
        ({"segments": GOOD.segments[2:]}, "layout.segments[0].layer, kv"),
        ({"segments": GOOD.segments[::-1]}, "layout.segments[0].layer, kv"),
        ({"segments": GOOD.segments[:2] * 2}, "layout.segments[2].layer, kv"),
        ({"segments": (Segment(0, 0, 64, 0, 64, 2),)}, "layout.segments[0].sharing"),
        ({"segments": (Segment(0, 0, 0, 0, 64),)}, "layout.segments[0].bytes"),
        ({"segments": (Segment(0, 0, 64, 0, 63),)}, "layout.segments[0].stride"),
    ],
)
def test_a_forged_layout_is_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        replace(GOOD, **changes)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_pages_that_overlap_are_refused() -> None:
    twice = (Segment(0, 0, 64, 0, 64), Segment(0, 1, 64, 32, 64))
    with pytest.raises(InvalidRequest, match="apart"):
        Layout(twice, 16).check_fits(4, 4096)
    interleaved = (Segment(0, 0, 64, 0, 128), Segment(0, 1, 64, 64, 128))
    Layout(interleaved, 16).check_fits(4, 4 * 128)


@pytest.mark.parametrize("lay", [layer_major, side_by_side])
def test_the_pools_of_engines_lie_apart_and_fill_their_memory(lay: Callable[..., Layout]) -> None:
    """Whatever the number of pages and layers; shifted by one byte they don't."""
    for layers, num_pages in itertools.product((1, 2, 5), (1, 2, 7)):
        found = lay(layers, num_pages, segment_bytes=64, page_size=16)
        found.check_fits(num_pages, num_pages * found.payload_bytes)
        assert len(bytes_of(found, num_pages)) == num_pages * found.payload_bytes
        if layers > 1:
            late = [
                *found.segments[:2],
                *(replace(s, offset=s.offset - 1) for s in found.segments[2:]),
            ]
            with pytest.raises(InvalidRequest, match="apart"):
                Layout(tuple(late), 16).check_fits(num_pages, num_pages * found.payload_bytes)


def bytes_of(layout: Layout, num_pages: int) -> Counter[int]:
    """How often each byte is a page's."""
    return Counter(
        each.offset + page * each.stride + byte
        for each in layout.segments
        for page in range(num_pages)
        for byte in range(each.bytes)
    )


segments_of_small_pools = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=5
)


@given(segments_of_small_pools, st.integers(1, 4))
def test_no_layout_that_is_taken_has_a_byte_in_two_pages(
    parts: list[tuple[int, int, int]], num_pages: int
) -> None:
    segments = [
        Segment(layer, 0, size, offset, size + more)
        for layer, (size, offset, more) in enumerate(parts)
    ]
    layout = Layout(tuple(segments), 16)
    try:
        layout.check_fits(num_pages, 1000)
    except InvalidRequest:
        return
    assert max(bytes_of(layout, num_pages).values()) == 1


@given(st.integers(1, 1 << 42), st.sampled_from([1 << 16, 1 << 20, 64 << 20]))
def test_a_slab_wastes_at_most_a_twentieth(page_bytes: int, slab_bytes: int) -> None:
    shape = slab_shape(page_bytes, slab_bytes)
    assert shape.slab_bytes % slab_bytes == 0
    used = shape.pages_per_slab * page_bytes
    assert 0 <= shape.slab_bytes - used <= 0.05 * shape.slab_bytes
    smaller = shape.slab_bytes - slab_bytes
    if smaller:
        assert smaller % page_bytes > 0.05 * smaller or smaller < page_bytes


def test_layers_need_not_be_alike_and_a_replicated_segment_is_another_layout() -> None:
    sizes = [(0, 0, 64), (0, 1, 32), (0, 2, 8), (1, 0, 512), (2, 0, 64), (2, 1, 64)]
    starts = np.cumsum([0] + [4 * size for _, _, size in sizes]).tolist()
    segments = [
        Segment(layer, kv, size, start, size)
        for (layer, kv, size), start in zip(sizes, starts, strict=False)
    ]
    mixed = Layout(tuple(segments), 16)
    assert mixed.layer_ends().tolist() == [3, 4, 6]
    assert Layout.from_proto(mixed.to_proto()) == mixed
    segments[2] = replace(segments[2], sharing=REPLICATED)
    assert Layout(tuple(segments), 16).digest != mixed.digest


def test_a_layout_that_version_1_knew_keeps_its_digest() -> None:
    """What is on disk under it stays there."""
    known = "cfb54a574721121591e1a67ba6ccc00b1c676c5f420abace40eaf5bb087c0090"
    assert layer_major(2, 4, segment_bytes=64, page_size=16).digest.hex() == known


def test_a_row_is_what_lies_side_by_side() -> None:
    apart = layer_major(2, 4, segment_bytes=64, page_size=16)
    assert apart.row_bytes == 64
    parts = [(layer, kv) for layer in (0, 1) for kv in (0, 1)]
    record = [Segment(*part, 64, 64 * i, 256) for i, part in enumerate(parts)]
    assert Layout(tuple(record), 16).row_bytes == 256
    pairs = [Segment(*part, 64, 512 * part[0] + 64 * part[1], 128) for part in parts]
    beside = Layout(tuple(pairs), 16)
    assert beside.row_bytes == 128
    told = beside.to_proto()
    told.row_bytes = 64
    with pytest.raises(InvalidRequest, match=r"layout\.row_bytes"):
        Layout.from_proto(told)


@given(st.integers(1, 1 << 20))
def test_a_block_of_ours_divides_any_engine_s(tokens: int) -> None:
    found = block_size(tokens)
    check_page_size("page_size", found)
    assert tokens % found == 0
    assert found == PAGE_SIZE_MAX or tokens % (2 * found)

"""Which copies move a page (kvc2/cuda/rows.py), against the layout's own words."""

from __future__ import annotations

import numpy as np
import pytest

from kvc2.cuda.rows import GROUPS_MAX, Rows, cut, groups

MAX_PITCH = (1 << 31) - 1


def layer_major(layers: int, pages: int, size: int) -> list[tuple[int, int, int]]:
    return [(j * pages * size, size, size) for j in range(2 * layers)]


def ends(layers: int) -> list[int]:
    return [2 * layer for layer in range(1, layers + 1)]


def test_a_page_of_our_pool_is_one_copy_a_group() -> None:
    """Qwen3-30B-A3B, page 16: rows of 16 KiB, 12 groups of 4 layers."""
    found = groups(layer_major(48, 1000, 16384), ends(48), MAX_PITCH)
    assert len(found) == GROUPS_MAX
    assert [each.layers_done for each in found] == list(range(4, 49, 4))
    assert {len(each.rows) for each in found} == {1}
    first = found[0].rows[0]
    assert (first.width, first.height, first.pitch) == (16384, 8, 1000 * 16384)
    assert [each.start for each in found] == [each * 8 * 16384 for each in range(12)]


def test_keys_and_values_side_by_side_are_one_row() -> None:
    segments = [
        (2 * layer * 1000 * 16384 + kv * 16384, 32768, 16384)
        for layer in range(48)
        for kv in (0, 1)
    ]
    rows = groups(segments, ends(48), MAX_PITCH)[0].rows
    assert [(each.width, each.height, each.pitch) for each in rows] == [(32768, 4, 1000 * 32768)]


def test_a_page_that_is_one_record_is_one_row_a_group() -> None:
    segments = [(j * 700, 8 * 700, 700) for j in range(8)]
    found = groups(segments, ends(4), MAX_PITCH)
    assert [(r.offset, r.width, r.height) for g in found for r in g.rows] == [
        (1400 * layer, 1400, 1) for layer in range(4)
    ]


@pytest.mark.parametrize(("most", "rows"), [(4095, 8), (4096, 8), (99 * 4096, 8), (100 * 4096, 1)])
def test_rows_too_far_apart_are_copies_of_their_own(most: int, rows: int) -> None:
    found = groups(layer_major(4, 100, 4096), [8], most)[0].rows
    assert len(found) == rows
    assert all(each.height == 1 or each.pitch <= most for each in found)


def test_neighbours_that_would_overlap_the_next_page_are_not_joined() -> None:
    """Beside one another, but pages follow at once: a joined row would be of two pages."""
    segments = [(0, 512, 512), (512, 512, 512)]
    rows = groups(segments, [2], MAX_PITCH)[0].rows
    assert [(each.width, each.height, each.pitch) for each in rows] == [(512, 2, 512)]


def test_rows_at_uneven_distances_are_several_copies() -> None:
    """A pool may have gaps wherever its engine wants them."""
    segments = [(at, 512, 512) for at in (0, 1000_000, 2000_000, 2500_000, 3000_000)]
    rows = groups(segments, [5], MAX_PITCH)[0].rows
    assert [(each.offset, each.height, each.pitch) for each in rows] == [
        (0, 3, 1000_000),
        (2500_000, 2, 500_000),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_cut_is_the_same_bytes_and_crosses_no_border(seed: int) -> None:
    random = np.random.default_rng(seed)
    width, height = int(random.integers(1, 300)), int(random.integers(1, 9))
    rows = Rows(int(random.integers(0, 99)), 0, width, height, width + 5, 0)
    piece, begin = int(random.integers(40, 1000)), int(random.integers(0, 5000))
    host, device = {}, rows.offset
    for part, at in cut(rows, begin, piece):
        for row in range(part.height):
            first = at + row * part.width
            for byte in range(part.width):
                assert first + byte not in host
                host[first + byte] = part.offset + row * part.pitch + byte
        assert at // piece == (at + part.bytes - 1) // piece
    expected = {
        begin + row * width + byte: device + row * rows.pitch + byte
        for row in range(height)
        for byte in range(width)
    }
    assert host == expected

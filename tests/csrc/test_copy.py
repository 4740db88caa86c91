"""Gather and scatter against a numpy reference, over every instruction set that is here."""

import os
import subprocess
import sys

import numpy as np
import pytest

from kvc2 import _core

INSTRUCTION_SETS = ["portable", "avx2", "avx512"]
LAYERS, NUM_PAGES = 5, 11
# bytes of the two segments of a layer: small, odd, whole lines, more than a piece of work
SEGMENT_BYTES = [(1, 3), (100, 1023), (1024, 1024), (6144, 6144), (4097, 70_001)]


class Pool:
    """A layer-major pool full of noise, and where its segments lie."""

    def __init__(self, segment_bytes: tuple[int, int], gap: int = 0, shift: int = 0) -> None:
        self.bytes = np.array(segment_bytes * LAYERS, np.uint64)
        strides = self.bytes + np.uint64(gap)
        ends = np.cumsum(strides * np.uint64(NUM_PAGES)) + np.uint64(shift)
        starts = np.concatenate([[np.uint64(shift)], ends[:-1]])
        self.segments = np.stack([starts, strides, self.bytes], axis=1)
        self.memory = np.random.default_rng(0).integers(0, 256, int(ends[-1]), np.uint8)
        self.payload_bytes = int(self.bytes.sum())

    def payload(self, page: int) -> bytes:
        """Its segments, one after the other: the reference for gather."""
        rows = self.segments.astype(int)
        return b"".join(self.memory[o + page * s :][:n].tobytes() for o, s, n in rows)


def ends(pool: Pool, segments_per_layer: int) -> np.ndarray:
    """Of layers that are alike."""
    count = len(pool.segments)
    return np.arange(segments_per_layer, count + 1, segments_per_layer, dtype=np.uint32)


def offsets_for(pool: Pool, count: int, seed: int = 4) -> np.ndarray:
    """Payloads an odd distance apart, not in order."""
    order = np.random.default_rng(seed).permutation(count).astype(np.uint64)
    return order * np.uint64(pool.payload_bytes + 5) + np.uint64(3)


def scatter(
    team: _core.ThreadTeam,
    arena: np.ndarray,
    offsets: np.ndarray,
    pool: Pool,
    pages: np.ndarray,
    **told: object,
) -> None:
    """Into the pool's memory; with two segments a layer, unless `told` says otherwise."""
    told = {"segments": pool.segments, "layer_ends": ends(pool, 2)} | told
    _core.scatter(team, arena, offsets, pool.memory, pages=pages, **told)


@pytest.fixture(params=[1, 2, 3])
def team(request: pytest.FixtureRequest) -> _core.ThreadTeam:
    return _core.ThreadTeam(request.param)


@pytest.mark.parametrize("segment_bytes", SEGMENT_BYTES)
@pytest.mark.parametrize(("gap", "shift"), [(0, 0), (7, 1), (64, 4096)])
def test_gather_then_scatter_moves_exactly_the_pages(team, segment_bytes, gap, shift):
    pool = Pool(segment_bytes, gap, shift)
    pages = np.array([10, 0, 3, 7, 4], np.uint32)
    offsets = offsets_for(pool, len(pages))
    arena = np.full(int(offsets.max()) + pool.payload_bytes + 9, 0xEE, np.uint8)
    expected = arena.copy()
    for page, offset in zip(pages.tolist(), offsets.tolist(), strict=True):
        expected[offset:][: pool.payload_bytes] = np.frombuffer(pool.payload(page), np.uint8)

    before = pool.memory.copy()
    _core.gather(team, pool.memory, pool.segments, pages, arena, offsets)
    np.testing.assert_array_equal(arena, expected)
    np.testing.assert_array_equal(pool.memory, before)

    wanted, cleared = pool.memory.copy(), np.zeros_like(pool.memory)
    _core.scatter(team, arena, offsets, cleared, pool.segments, pages, layer_ends=ends(pool, 2))
    held = np.zeros(len(wanted), bool)
    for offset, stride, length in pool.segments.astype(int):
        for page in pages.tolist():
            held[offset + page * stride :][:length] = True
    np.testing.assert_array_equal(cleared, np.where(held, wanted, 0))


@pytest.mark.parametrize("segments_per_layer", [1, 2, 10])
def test_scatter_counts_layers_in_the_progress_word_and_the_event(team, segments_per_layer):
    pool, pages = Pool((512, 2048)), np.array([1, 2], np.uint32)
    offsets = offsets_for(pool, 2)
    arena = np.zeros(int(offsets.max()) + pool.payload_bytes, np.uint8)
    progress, event = np.zeros(1, np.uint64), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        scatter(
            team, arena, offsets, pool, pages,
            layer_ends=ends(pool, segments_per_layer),
            progress=progress, progress_base=1 << 40, event_fd=event,
        )  # fmt: skip
        layers = len(pool.segments) // segments_per_layer
        assert progress[0] == (1 << 40) + layers
        assert os.eventfd_read(event) == layers
    finally:
        os.close(event)


def test_layers_need_not_have_the_same_segments(team):
    """The progress word counts a layer when all of its segments are there, how many they may be."""
    pool, pages = Pool((512, 2048, 70_001)), np.array([3, 1], np.uint32)
    count = len(pool.segments)
    offsets, progress = offsets_for(pool, 2), np.zeros(1, np.uint64)
    arena = np.full(int(offsets.max()) + pool.payload_bytes, 7, np.uint8)
    layer_ends = np.array([1, 4, 5, count], np.uint32)
    for last in range(1, 5):
        ends_here = np.array([*layer_ends[: last - 1], count], np.uint32)
        pool.memory[:] = 0
        scatter(team, arena, offsets, pool, pages, layer_ends=ends_here, progress=progress)
        assert progress[0] == last
        assert {pool.payload(page) for page in (3, 1)} == {bytes([7]) * pool.payload_bytes}


def test_a_closed_event_is_an_error_but_the_pages_are_there():
    pool, pages = Pool((512, 2048)), np.array([1], np.uint32)
    offsets = np.zeros(1, np.uint64)
    arena = np.full(pool.payload_bytes, 9, np.uint8)
    event = os.eventfd(0)
    os.close(event)
    with pytest.raises(OSError, match="Bad file descriptor"):
        scatter(_core.ThreadTeam(2), arena, offsets, pool, pages, event_fd=event)
    assert pool.payload(1) == bytes(arena)


@pytest.mark.parametrize(
    ("page", "offset", "says"),
    [
        (NUM_PAGES, 0, r"pages\[1\] = 11"),
        (2**32 - 1, 0, r"pages\[1\]"),
        (0, 1, r"offsets\[1\] = 1"),
    ],
)
def test_what_lies_outside_is_named_and_nothing_moves(page: int, offset: int, says: str):
    pool, team = Pool((100, 200)), _core.ThreadTeam(2)
    pages, offsets = np.array([0, page], np.uint32), np.array([0, offset], np.uint64)
    arena = np.full(pool.payload_bytes, 0xEE, np.uint8)
    before = pool.memory.copy()
    with pytest.raises(IndexError, match=says):
        _core.gather(team, pool.memory, pool.segments, pages, arena, offsets)
    with pytest.raises(IndexError, match=says):
        scatter(team, arena, offsets, pool, pages)
    assert (arena == 0xEE).all()
    np.testing.assert_array_equal(pool.memory, before)


def test_a_segment_that_wraps_round_is_outside():
    segments = np.array([[2**64 - 8, 2**63, 16]], np.uint64)
    pages, offsets = np.array([2], np.uint32), np.zeros(1, np.uint64)
    memory = np.zeros(64, np.uint8)
    with pytest.raises(IndexError, match=r"segments\[0\]"):
        _core.gather(_core.ThreadTeam(1), memory, segments, pages, memory.copy(), offsets)


def test_a_wrong_argument_is_named():
    pool, team = Pool((8, 8)), _core.ThreadTeam(1)
    assert team.threads == 1
    pages, offsets = np.array([0], np.uint32), np.array([0], np.uint64)
    arena = np.zeros(pool.payload_bytes, np.uint8)

    def refused(pages: np.ndarray = pages, **told: object) -> None:
        scatter(team, arena, offsets, pool, pages, **told)

    with pytest.raises(TypeError, match="pages"):
        refused(pages=pages.astype(np.int32))
    with pytest.raises(ValueError, match="offsets has shape"):
        refused(pages=np.array([0, 1], np.uint32))
    with pytest.raises(ValueError, match="segments has shape"):
        refused(segments=pool.segments[:, :2].copy())
    count = len(pool.segments)
    for wrong in ([], [0, count], [2, 2, count], [4, 2, count], [2], [2, count + 1]):
        with pytest.raises(ValueError, match="layer_ends does not rise to the"):
            refused(layer_ends=np.array(wrong, np.uint32))
    with pytest.raises(ValueError, match="progress"):
        refused(progress=bytearray(7))
    with pytest.raises(TypeError, match="arena is not a writable"):
        _core.gather(team, pool.memory, pool.segments, pages, bytes(arena), offsets)
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match="threads"):
            _core.ThreadTeam(threads)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_copies_agree_on_every_instruction_set(isa: str):
    """The tests above, in a process whose core may use nothing better than `isa`."""
    if INSTRUCTION_SETS.index(_core.copy_backend()) < INSTRUCTION_SETS.index(isa):
        pytest.skip(f"this machine, or KVC2_ISA, has no {isa}")
    tests = ["-k", "exactly or counts or layers or each_buffer", __file__]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"KVC2_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    backend = [sys.executable, "-c", "from kvc2 import _core; print(_core.copy_backend())"]
    said = subprocess.run(
        backend, env=os.environ | {"KVC2_ISA": isa}, capture_output=True, text=True, check=True
    )
    assert said.stdout.split()[-1] == isa


@pytest.mark.parametrize("sizes", [[], [0], [1, 1023, 0, 1024, 70_001], [300_000, 5, 1 << 20]])
def test_each_buffer_is_copied_into_its_own(team, sizes):
    random = np.random.default_rng(7)
    sources = [random.integers(0, 256, size, np.uint8) for size in sizes]
    memory = np.full(sum(sizes) + len(sizes) + 1, 0xEE, np.uint8)
    expected, targets, begin = memory.copy(), [], 1
    for source in sources:  # a byte apart: nothing between them is touched
        targets.append(memory[begin : begin + source.size])
        expected[begin : begin + source.size] = source
        begin += source.size + 1
    _core.copy_each(team, [bytes(each) for each in sources], targets)
    np.testing.assert_array_equal(memory, expected)


def test_a_target_that_does_not_fit_is_named_and_nothing_is_copied(team):
    sources, mine = [b"abc", b"abc"], [bytearray(3), bytearray(2)]
    with pytest.raises(ValueError, match=r"sources\[1\] has 3 bytes, its target 2"):
        _core.copy_each(team, sources, mine)
    assert mine[0] == bytearray(3)
    with pytest.raises(ValueError, match="2 sources for 1 targets"):
        _core.copy_each(team, sources, mine[:1])
    with pytest.raises(TypeError, match="writable"):
        _core.copy_each(team, sources, [bytearray(3), b"abc"])

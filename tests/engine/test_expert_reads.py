"""What is read is what lies in the file, wherever it begins; and what fails writes no more."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.experts import reads
from engine.experts.reads import BLOCK_BYTES, SECTOR, ExpertReadError, Part, Reader
from engine.extents import Extent

FILE_BYTES = 5 * BLOCK_BYTES + 123
DATA = np.random.default_rng(0).integers(0, 256, FILE_BYTES).astype(np.uint8)


@pytest.fixture(scope="module")
def fd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path: Path = tmp_path_factory.mktemp("file") / "experts"
    path.write_bytes(DATA.tobytes())
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture(scope="module")
def reader(fd: int) -> Iterator[Reader]:
    made = Reader([fd])
    yield made
    made.close()


def part(fd: int, begin: int, num_bytes: int, digest: str | None = None) -> Part:
    found = digest or xxhash.xxh3_128(DATA[begin : begin + num_bytes]).hexdigest()
    extent = Extent("w", fd, begin, num_bytes, lambda: found)
    return Part(extent, torch.full((num_bytes + 2,), 7, dtype=torch.uint8)[1:-1])


near = st.sampled_from([0, SECTOR, BLOCK_BYTES, 2 * BLOCK_BYTES, 4 * BLOCK_BYTES])
places = st.tuples(near, st.integers(0, 64), near, st.integers(1, 64)).map(
    lambda each: (each[0] + each[1], each[2] + each[3])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(places.filter(lambda p: sum(p) <= FILE_BYTES), min_size=1, max_size=4))
def test_all_bytes_come_and_none_beside_them(
    fd: int, reader: Reader, where: list[tuple[int, int]]
) -> None:
    parts = [part(fd, *each) for each in where]
    reader.begin(parts).result(timeout=60)
    for (begin, num_bytes), each in zip(where, parts, strict=True):
        assert np.array_equal(each.into.numpy(), DATA[begin : begin + num_bytes])
        whole = torch.as_strided(each.into, (num_bytes + 2,), (1,), 0)
        assert whole[0] == whole[-1] == 7


def test_a_file_that_ends_early_or_says_something_else_is_an_error(fd: int, reader: Reader) -> None:
    with pytest.raises(ExpertReadError, match="has become shorter"):
        reader.begin([part(fd, 0, 100), part(fd, FILE_BYTES - 8, 5000, "?")]).result(timeout=60)
    with pytest.raises(ExpertReadError, match="was written since"):
        reader.begin([part(fd, 0, 100), part(fd, 5, 3 * BLOCK_BYTES, "?")]).result(timeout=60)
    reader.begin([part(fd, 0, 100)]).result(timeout=60)


def test_the_blocks_of_one_expert_are_read_at_the_same_time(
    fd: int, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits until as many as a disk is asked at a time are under way: else it never ends."""
    together = threading.Barrier(4)
    inner = Reader.bytes_of

    def waiting(self: Reader, *where: object) -> memoryview:
        together.wait(timeout=60)
        return inner(self, *where)  # type: ignore[arg-type]

    monkeypatch.setattr(reads.Reader, "bytes_of", waiting)
    parts = [part(fd, 0, 2 * BLOCK_BYTES), part(fd, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES)]
    reader.begin(parts).result(timeout=60)


def test_it_has_not_failed_before_nobody_writes_any_more(
    fd: int, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, go_on = threading.Event(), threading.Event()
    inner = Reader.bytes_of

    def slow(self: Reader, extent: Extent, first: int, end: int) -> memoryview:
        if first == 0:
            go_on.wait(timeout=60)
            return inner(self, extent, first, end)
        failed.set()
        raise ExpertReadError("gone")

    monkeypatch.setattr(reads.Reader, "bytes_of", slow)
    slowest = part(fd, 0, 100)
    reading = reader.begin([slowest, part(fd, BLOCK_BYTES, 100)])
    assert failed.wait(timeout=60)
    time.sleep(0.01)
    assert not reading.done()
    go_on.set()
    with pytest.raises(ExpertReadError, match="gone"):
        reading.result(timeout=60)
    before = slowest.into.clone()
    time.sleep(0.01)
    assert torch.equal(slowest.into, before)

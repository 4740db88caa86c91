"""What a record says of a block comes back; a plain one is what format 1 had; garbage is damage."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvc2.tiers.base import PageShape
from kvc2.tiers.disk import names_file
from kvc2.tiers.disk.catalogue import SLACK_BYTES_MIN, Catalogue, Change
from kvc2.tiers.disk.lmdb_file import Damaged
from kvc2.tiers.disk.records import (
    NamespaceEntry,
    Stored,
    decode,
    encode,
    record_type,
    room_bytes,
)
from kvc2.tiers.disk.slab_file import Files

U8 = NDArray[np.uint8]
SIZES = (1, 4, 16, 32)


@dataclass
class Blocks:
    digests: U8
    parents: U8
    tokens: NDArray[np.uint32]
    external_bytes: U8
    external_keys: U8
    extras: U8
    generations: NDArray[np.uint64]
    checksums: U8
    pages: NDArray[np.uint32]

    @classmethod
    def of(cls, page_size: int, kinds: list[tuple[int, bool]], seed: int = 0) -> Blocks:
        """A block each: the length of its key (0: tokens name it), and whether it has extras."""
        chance, count = np.random.default_rng(seed), len(kinds)

        def some(width: int) -> U8:
            return chance.integers(1, 256, (count, width), np.uint8)

        tokens = chance.integers(0, 1 << 32, (count, page_size), np.uint32)
        found = cls(
            some(32),
            some(32),
            tokens,
            np.array([length for length, _ in kinds], np.uint8),
            some(64),
            some(32),
            chance.integers(0, 1 << 63, count, np.uint64),
            some(16),
            np.sort(chance.choice(1 << 20, count, replace=False)).astype(np.uint32),
        )
        for row, (length, has_extras) in enumerate(kinds):
            found.external_keys[row, length:] = 0
            if length:
                found.tokens[row] = 0
            if not has_extras:
                found.extras[row] = 0
        return found

    def encoded(self) -> tuple[list[bytes], list[bytes]]:
        rows = encode(3, self.pages, self, self.generations, self.checksums)
        return [key for key, _ in rows], [value for _, value in rows]

    def assert_is(self, stored: Stored) -> None:
        assert (stored.pages == self.pages).all()
        for name in ("external_bytes", "external_keys", "extras"):
            assert (getattr(stored, name) == getattr(self, name)).all(), name
        for name, values in [
            ("digest", self.digests),
            ("parent", self.parents),
            ("tokens", self.tokens),
            ("generation", self.generations),
            ("checksum", self.checksums),
        ]:
            assert (stored.records[name] == values).all(), name
        assert stored.unread.size == 0


KINDS = st.lists(st.tuples(st.sampled_from([0, 0, 1, 16, 32, 63, 64]), st.booleans()), max_size=9)


@given(page_size=st.sampled_from(SIZES), kinds=KINDS, seed=st.integers(0, 99))
def test_what_a_record_says_comes_back(
    page_size: int, kinds: list[tuple[int, bool]], seed: int
) -> None:
    blocks = Blocks.of(page_size, kinds, seed)
    keys, values = blocks.encoded()
    assert keys == [struct.pack(">II", 3, page) for page in blocks.pages.tolist()]
    stored = decode(keys, values, page_size)
    blocks.assert_is(stored)
    odd = np.arange(len(kinds)) % 2 == 1
    some = stored.chosen(odd)
    assert (some.external_keys == blocks.external_keys[odd]).all()
    assert (some.extras == blocks.extras[odd]).all()
    assert (some.records["digest"] == blocks.digests[odd]).all()
    turned = stored.chosen(np.arange(len(kinds))[::-1])
    assert (turned.external_bytes == blocks.external_bytes[::-1]).all()


@pytest.mark.parametrize("page_size", SIZES)
def test_a_plain_record_is_what_format_1_had(page_size: int) -> None:
    blocks = Blocks.of(page_size, [(0, False)] * 3)
    _, values = blocks.encoded()
    for row, value in enumerate(values):
        assert value == (
            blocks.digests[row].tobytes()
            + blocks.parents[row].tobytes()
            + struct.pack("<Q", int(blocks.generations[row]))
            + blocks.checksums[row].tobytes()
            + struct.pack(f"<{page_size}I", *blocks.tokens[row].tolist())
        )


def test_what_a_tail_costs() -> None:
    """Bytes of a record; those of a plain one have not grown."""
    kinds = [(0, False), (32, False), (64, False), (0, True), (64, True)]
    sizes = {
        page_size: [len(value) for value in Blocks.of(page_size, kinds).encoded()[1]]
        for page_size in (4, 16, 128)
    }
    assert sizes == {
        4: [104, 154, 154, 137, 186],
        16: [152, 154, 154, 185, 186],
        128: [600, 602, 602, 633, 634],
    }


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 512])
def test_the_room_for_a_slabs_records_is_as_large_as_without_keys(page_size: int) -> None:
    """So that no directory of format 1 loses a slab to it, however full; with fewer tokens a page
    is too small for anybody to have one."""
    plain = 88 + 4 * page_size + 16
    before = 4160 if page_size == 512 else int(4096 / (4080 // plain * 0.5))
    shape = PageShape(bytes(32), page_size, 4096, 8192, 8192 * 10, 10)
    assert room_bytes(shape) == 10 * (before + 24)


def one(page_size: int, length: int, *, extras: bool = False) -> tuple[list[bytes], bytes]:
    keys, (value,) = Blocks.of(page_size, [(length, extras)]).encoded()
    return keys, value


@pytest.mark.parametrize("flags", [4, 5, 128, 0])
def test_a_record_that_says_more_than_is_known_is_not_read(flags: int) -> None:
    """A later writer's; and the others are."""
    blocks = Blocks.of(16, [(0, False), (32, False), (0, False)])
    keys, values = blocks.encoded()
    values[2] += bytes([flags]) + b"something"
    stored = decode(keys, values, 16)
    assert stored.unread.tolist() == blocks.pages[2:].tolist()
    assert stored.pages.tolist() == blocks.pages[:2].tolist()
    assert (stored.external_keys == blocks.external_keys[:2]).all()


def test_a_record_that_nobody_writes_is_damage() -> None:
    size = record_type(16).itemsize
    keys, plain = one(16, 0)
    _, keyed = one(16, 20)
    _, extras = one(16, 0, extras=True)
    for value in [
        plain[:-1],
        b"",
        keyed + b"x",
        keyed[:-1],
        extras[:-1],
        extras[: size + 1] + bytes(32),  # a tail that says nothing
        keyed[:-1] + b"\0",  # a key without a byte
        keyed[:-1] + b"\x41",  # of more than 64
        keyed[:-1] + b"\x13",  # bytes beyond the key
    ]:
        with pytest.raises(Damaged):
            decode(keys, [value], 16)
    with pytest.raises(Damaged):
        decode([keys[0] + b"x"], [plain], 16)


def test_a_namespace_keeps_how_its_blocks_are_named(tmp_path: Path) -> None:
    """And one of tokens is what format 1 had."""
    entries = {
        b"t" * 32: NamespaceEntry(16, b"{}"),
        b"k" * 32: NamespaceEntry(512, b"{}", opaque=True),
    }
    assert [each.word for each in entries.values()] == [16, 512 | 1 << 16]
    names_file.write(tmp_path / "namespaces", names_file.Names(entries), 4096, Files())
    found = names_file.read(tmp_path / "namespaces")
    assert found is not None
    assert found.namespaces == entries
    catalogue = Catalogue(tmp_path / "catalogue", SLACK_BYTES_MIN)
    for name, entry in entries.items():
        assert catalogue.add_namespace(name, entry)
    catalogue.commit(Change())
    catalogue.close()
    again = Catalogue(tmp_path / "catalogue", SLACK_BYTES_MIN, read_only=True)
    assert again.namespaces == entries
    again.close()
    with pytest.raises(Damaged, match="key mode 2"):
        NamespaceEntry.of(16 | 2 << 16, b"{}")

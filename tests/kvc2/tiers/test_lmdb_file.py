"""The check of LMDB's file: no sound one is refused, whatever was done with it; pages that LMDB
would die of are."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from pathlib import Path

import lmdb
import pytest

from kvc2.tiers.disk.lmdb_file import PAGE_BYTES, Damaged, check_file


def churn(path: Path, seed: int, steps: int) -> None:
    """Transactions of all that the catalogue does, with values from none to several pages, in a map
    that runs full; some are given up; some close and open again."""
    chance = random.Random(seed)
    size = chance.choice([1, 2, 4]) << 20
    environment = None
    for step in range(steps):
        if environment is None:
            environment = lmdb.open(str(path), map_size=size, max_dbs=4)
            tables = [environment.open_db(name) for name in (b"meta", b"layouts", b"blocks")]
        largest = chance.choice([40, 400, 2100, 9000])
        try:
            # one that was given up says so when it ends
            with suppress(lmdb.BadTxnError), environment.begin(write=True) as txn:
                for _ in range(chance.choice([1, 10, 200])):
                    key = struct.pack(">II", 1, chance.randrange(400))
                    if chance.random() < 0.5:
                        txn.delete(key, db=tables[2])
                    else:
                        txn.put(key, chance.randbytes(chance.randrange(largest)), db=tables[2])
                txn.put(b"name%d" % chance.randrange(30), chance.randbytes(50), db=tables[1])
                if chance.random() < 0.1:
                    txn.abort()
        except lmdb.MapFullError:
            size += 1 << 20
            environment.set_mapsize(size)
        needed = (environment.info()["last_pgno"] + 1) * PAGE_BYTES
        file = path / "data.mdb"
        if file.stat().st_size < needed:  # as Catalogue does
            with file.open("r+b") as opened:
                opened.truncate(needed)
        check_file(file)
        if step % 17 == 16:
            environment.close()
            environment = None
    if environment is not None:
        environment.close()


@pytest.mark.parametrize("seed", range(4))
def test_no_sound_file_is_refused(tmp_path: Path, seed: int) -> None:
    churn(tmp_path, seed, 150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_no_sound_file_is_refused_whatever_was_done(tmp_path: Path, seed: int) -> None:
    churn(tmp_path, seed, 600)


def test_no_file_and_an_empty_one_are_sound(tmp_path: Path) -> None:
    check_file(tmp_path / "data.mdb")
    (tmp_path / "data.mdb").touch()
    check_file(tmp_path / "data.mdb")


def number(page: bytearray, place: int, value: int) -> None:
    struct.pack_into("<H", page, place, value)


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (0, 9999, "another number"),
        (10, 1, "not of its level"),
        (12, 4000, "not of its level"),
        (14, 60000, "not of its level"),
        (16, 5000, "outside of its page"),
        (16, 64, "outside of its page"),
    ],
)
def test_a_page_that_lmdb_would_die_of_is_damage(
    tmp_path: Path, place: int, value: int, what: str
) -> None:
    with lmdb.open(str(tmp_path), map_size=1 << 20, max_dbs=4) as environment:
        table = environment.open_db(b"blocks")
        with environment.begin(write=True, db=table) as txn:
            for key in range(8):
                txn.put(struct.pack(">Q", key), bytes(100))
    file = tmp_path / "data.mdb"
    data = bytearray(file.read_bytes())
    leaf = data.index(struct.pack(">Q", 7) + bytes(100)) // PAGE_BYTES
    page = data[leaf * PAGE_BYTES : (leaf + 1) * PAGE_BYTES]
    number(page, place, value)
    data[leaf * PAGE_BYTES : (leaf + 1) * PAGE_BYTES] = page
    file.write_bytes(data)
    with pytest.raises(Damaged, match=what):
        check_file(file)

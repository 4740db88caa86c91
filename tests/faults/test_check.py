"""`kvc2 check` finds each kind of damage, --repair mends it, and a daemon then serves the rest."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb
import pytest
from typer.testing import CliRunner

from kvc2.commands import check as check_command
from kvc2.commands import cli
from kvc2.tiers.disk.check import DAMAGE, Report, check
from kvc2.tiers.disk.records import record_type
from kvc2.tiers.disk.repair import repair
from kvc2.tiers.disk.slab_file import Files
from tests.doubles.caches import MIB, faults, running
from tests.doubles.stand_in import NAMESPACE, PAGE_SIZE, StandIn, prompt
from tests.faults.test_disk_faults import (
    BLOCKS,
    PAGE_BYTES,
    damage_meta,
    flip,
    flip_header,
    flip_payload,
    flip_record,
    remove,
    slab,
    swap_pages,
    truncate,
    truncate_catalogue,
)

OTHER = 4  # blocks of a second prompt, which nothing happens to
Harm = Callable[[Path], None]


async def two_prompts(path: Path) -> None:
    """A directory with a prompt of BLOCKS blocks in pages 0 to 7, and another one."""
    async with running(path) as cache:
        engine = StandIn(cache, 64)
        await engine.ask(prompt(1, BLOCKS))
        await cache.flush(10)
        await engine.ask(prompt(2, OTHER))
        assert (await cache.flush(10)).durable_blocks == BLOCKS + OTHER


Change = Callable[[lmdb.Transaction, list[tuple[bytes, bytes]]], object]


def in_blocks(path: Path, change: Change) -> None:
    environment = lmdb.open(str(path / "catalogue"), max_dbs=4, map_size=64 * MIB)
    table = environment.open_db(b"blocks")
    with environment.begin(db=table, write=True) as txn:
        change(txn, [(bytes(key), bytes(value)) for key, value in txn.cursor()])
    environment.close()


def field_of(name: str) -> slice:
    kind = record_type(PAGE_SIZE)
    assert kind.fields is not None
    of, start = kind.fields[name][:2]
    return slice(start, start + of.itemsize)


def change_field(name: str) -> Harm:
    """Another value in the record of the block in page 4, and nowhere else."""

    def harm(path: Path) -> None:
        def change(txn: lmdb.Transaction, rows: list[tuple[bytes, bytes]]) -> None:
            key, value = rows[4]
            changed = bytearray(value)
            changed[field_of(name).start] ^= 2
            txn.put(key, bytes(changed))

        in_blocks(path, change)

    return harm


def drop_record(path: Path) -> None:
    in_blocks(path, lambda txn, rows: txn.delete(rows[4][0]))


def record_twice(path: Path) -> None:
    """A second page is said to hold the block of page 4."""
    in_blocks(path, lambda txn, rows: txn.put(struct.pack(">II", 1, 60), rows[4][1]))


def of_unknown_layout(path: Path) -> None:
    in_blocks(path, lambda txn, rows: txn.put(struct.pack(">II", 7, 3), rows[4][1]))


def from_a_later_version(path: Path) -> None:
    """The record of the block in page 4 says something that nobody knows here."""
    in_blocks(path, lambda txn, rows: txn.put(rows[4][0], rows[4][1] + b"\x80more"))


def orphan_folder(path: Path) -> None:
    folder = path / "slabs" / ("ab" * 32)
    folder.mkdir()
    (folder / "00000000.slab").write_bytes(bytes(4096))


def short_slab(path: Path) -> None:
    (slab(path).parent / "00000001.slab").write_bytes(bytes(4096))


def no_catalogue(path: Path) -> None:
    shutil.rmtree(path / "catalogue")


def flip_table(path: Path) -> None:
    (table,) = path.glob("live/*")
    flip(table, 40)


def flip_names(path: Path) -> None:
    flip(path / "namespaces", 40)


def no_proof(path: Path) -> None:
    damage_meta(path)
    flip_table(path)


# harm, what a check counts, blocks of the first prompt that are served after --repair
HARMS: list[tuple[Harm, dict[str, int], int]] = [
    (flip_payload, {"bad_payload": 1}, 4),
    (flip_header, {"bad_header": 1}, 4),
    (swap_pages, {"foreign_block": 2}, 4),
    (change_field("generation"), {"stale_page": 1}, 4),
    (change_field("checksum"), {"other_payload": 1}, 4),
    (flip_record, {"forged_record": 1, "orphan_record": 3}, 4),
    (drop_record, {"orphan_record": 3}, 4),
    (record_twice, {"duplicate_record": 1}, BLOCKS),
    (of_unknown_layout, {"unknown_layout": 1}, BLOCKS),
    (from_a_later_version, {"unread_record": 1, "orphan_record": 3}, 4),
    (truncate, {"lost_slab": 1, "lost_block": BLOCKS + OTHER}, 0),
    (remove, {"lost_slab": 1, "lost_block": BLOCKS + OTHER}, 0),
    (orphan_folder, {"orphan_slab": 1}, BLOCKS),
    (short_slab, {"orphan_slab": 1}, BLOCKS),
    (damage_meta, {"catalogue": 1}, BLOCKS),
    (truncate_catalogue, {"catalogue": 1}, BLOCKS),
    (no_catalogue, {"catalogue": 1}, BLOCKS),
    (no_proof, {"catalogue": 1, "orphan_slab": 1}, 0),
    (flip_table, {"live_table": 1}, BLOCKS),
    (flip_names, {"namespaces": 1}, BLOCKS),
]
NAMES = [harm.__qualname__.split(".")[0] + str(n) for n, (harm, _, _) in enumerate(HARMS)]


def counted(report: Report) -> dict[str, int]:
    assert set(report.damage) <= set(DAMAGE)
    return {kind: count for kind, count in report.damage.items() if count}


def files_of(path: Path) -> dict[str, bytes]:
    return {
        str(each.relative_to(path)): each.read_bytes()
        for each in sorted(path.rglob("*"))
        if each.is_file()
    }


@pytest.mark.parametrize(("harm", "damage", "kept"), HARMS, ids=NAMES)
def test_damage_is_found_and_mended_and_the_rest_is_served(
    tmp_path: Path, harm: Harm, damage: dict[str, int], kept: int
) -> None:
    async def run() -> None:
        await two_prompts(tmp_path)
        assert check(tmp_path).sound
        harm(tmp_path)
        before = files_of(tmp_path)
        report = check(tmp_path)
        assert counted(report) == damage
        assert files_of(tmp_path) == before  # a check changes nothing
        assert repair(tmp_path, report).complete
        again = check(tmp_path)
        assert again.sound
        other = OTHER if kept else 0
        assert again.records == again.verified_blocks == kept + other
        async with running(tmp_path) as cache:
            assert faults(cache, "restore_refused") == 0
            engine = StandIn(cache, 64)
            found = await engine.ask(prompt(1, BLOCKS))  # judges every byte
            assert found.matched_tokens == kept * PAGE_SIZE
            assert (await engine.ask(prompt(2, OTHER))).matched_tokens == other * PAGE_SIZE
            assert all(
                faults(cache, kind) == 0
                for kind in ("corrupt_block", "foreign_block", "stale_page")
            )
            assert (await cache.flush(10)).not_durable_blocks == {}
        assert check(tmp_path).sound

    asyncio.run(run())


def test_bad_blocks_are_named(tmp_path: Path) -> None:
    asyncio.run(two_prompts(tmp_path))
    flip_payload(tmp_path)
    (bad,) = check(tmp_path).blocks
    assert (bad.kind, bad.slab, bad.page) == ("bad_payload", 0, 4)
    rows = []
    in_blocks(tmp_path, lambda txn, found: rows.extend(found))
    assert bad.digest == rows[4][1][:32].hex()
    assert bad.layout == slab(tmp_path).parent.name


class BadSector(Files):
    """Reading the fifth page fails."""

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= 4 * PAGE_BYTES < offset + sum(map(len, buffers)):
            if offset == 4 * PAGE_BYTES:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(fd, [buffers[0][: 4 * PAGE_BYTES - offset]], offset)
        return super().read(fd, buffers, offset)


def test_what_can_not_be_read_is_damage(tmp_path: Path) -> None:
    asyncio.run(two_prompts(tmp_path))
    report = check(tmp_path, files=BadSector(read_only=True))
    assert report.damage["unreadable_block"] >= 1
    assert set(counted(report)) == {"unreadable_block"}


def test_many_parts_are_verified_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvc2.tiers.disk.check.PART_BYTES", 2 * PAGE_BYTES)
    told: list[tuple[int, int]] = []

    async def run() -> None:
        async with running(tmp_path) as cache:
            engine = StandIn(cache, 256)
            for seed in range(8):
                await engine.ask(prompt(seed, 25))
            await cache.flush(10)

    asyncio.run(run())
    report = check(tmp_path, lambda done, total: told.append((done, total)))
    assert report.sound
    assert report.verified_blocks == report.records == 200
    assert told[0] == (0, 200 * PAGE_BYTES)
    assert told[-1] == (200 * PAGE_BYTES, 200 * PAGE_BYTES)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) > 50
    keys: list[bytes] = []
    in_blocks(tmp_path, lambda txn, rows: keys.extend(key for key, _ in rows))
    spoiled = {struct.unpack(">II", keys[n])[1] for n in (3, 77, 150, 199)}
    for page in spoiled:
        number, place = divmod(page, MIB // PAGE_BYTES)
        with sorted(tmp_path.glob("slabs/*/*.slab"))[number].open("r+b") as file:
            file.seek(place * PAGE_BYTES + 5000)
            file.write(b"wrong")
    report = check(tmp_path)
    assert counted(report) == {"bad_payload": 4}
    assert {each.page for each in report.blocks} == spoiled


def test_blocks_of_an_invalidated_namespace_are_no_damage(tmp_path: Path) -> None:
    """As after a kill between the commit of an Invalidate and that of its deletes."""

    async def run() -> None:
        await two_prompts(tmp_path)
        rows: list[tuple[bytes, bytes]] = []
        in_blocks(tmp_path, lambda txn, found: rows.extend(found))
        async with running(tmp_path) as cache:
            StandIn(cache, 64)
            await cache.invalidate([NAMESPACE])
            await cache.flush(10)
        in_blocks(tmp_path, lambda txn, _: [txn.put(*row) for row in rows][:0])

    asyncio.run(run())
    report = check(tmp_path)
    assert report.sound
    assert report.dead_blocks == BLOCKS + OTHER


# ---- the command ----


def command(*arguments: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, ["check", *map(str, arguments)])
    return found.exit_code, found.output


def test_the_command_tells_repairs_and_is_sound_then(tmp_path: Path) -> None:
    asyncio.run(two_prompts(tmp_path))
    code, text = command(tmp_path)
    assert code == 0
    assert "12 records, 1 slabs, 1 layouts, 1 namespaces" in text
    assert text.endswith("sound\n")
    flip_payload(tmp_path)
    code, text = command(tmp_path)
    assert code == 1
    assert "bad_payload" in text
    assert "slab 0, page 4" in text
    assert "--repair" in text
    code, text = command(tmp_path, "--repair", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["damage"] == {"bad_payload": 1}
    assert (found["sound"], found["sound_after_repair"]) == (False, True)
    assert (found["repaired"]["damaged_records"], found["repaired"]["hanging_records"]) == (1, 3)
    code, text = command(tmp_path, "--json")
    assert (code, json.loads(text)["records"]) == (0, 8)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path):
            before = (tmp_path / "catalogue/data.mdb").read_bytes()
            code, text = await asyncio.to_thread(command, tmp_path, "--repair")
            assert code == 2
            assert "another daemon serves this directory" in text
            assert (tmp_path / "catalogue/data.mdb").read_bytes() == before

    asyncio.run(run())


def test_what_is_no_disk_path_is_bad_usage(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        code, text = command(path)
        assert code == 2
        assert "DIR" in text
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused_also_by_repair(tmp_path: Path) -> None:
    asyncio.run(two_prompts(tmp_path))
    with lmdb.open(str(tmp_path / "catalogue"), max_dbs=4) as env:
        table = env.open_db(b"meta")
        with env.begin(db=table, write=True) as txn:
            txn.put(b"format", (99).to_bytes(8, "little"))
    before = files_of(tmp_path)
    for arguments in ([], ["--repair"]):
        code, text = command(tmp_path, *arguments)
        assert code == 1
        assert "format 99" in text
    assert files_of(tmp_path) == before


def test_slabs_without_catalogue_and_tables_are_orphans(tmp_path: Path) -> None:
    asyncio.run(two_prompts(tmp_path))
    shutil.rmtree(tmp_path / "catalogue")
    shutil.rmtree(tmp_path / "live")
    assert counted(check(tmp_path)) == {"orphan_slab": 1}
    assert command(tmp_path, "--repair")[0] == 0
    assert list(tmp_path.glob("slabs/*/*")) == []


def test_a_rebuilt_catalogue_is_checked_and_mended_in_turn(tmp_path: Path) -> None:
    asyncio.run(two_prompts(tmp_path))
    damage_meta(tmp_path)
    flip_payload(tmp_path)
    assert check(tmp_path).rebuildable == BLOCKS + OTHER
    code, text = command(tmp_path, "--repair")
    assert code == 0
    assert f"look for {BLOCKS + OTHER} blocks" in text
    assert f"sound now: {4 + OTHER} records" in text


def test_what_a_rebuild_would_lose_is_told_and_no_damage(tmp_path: Path) -> None:
    asyncio.run(two_prompts(tmp_path))
    assert check(tmp_path).unproven == 0
    (table,) = tmp_path.glob("live/*")
    data = bytearray(table.read_bytes())
    data[4096 + 8 * 4] ^= 1
    table.write_bytes(data)
    report = check(tmp_path)
    assert (report.sound, report.unproven) == (True, 1)
    shutil.rmtree(tmp_path / "live")
    report = check(tmp_path)
    assert (report.sound, report.unproven) == (True, BLOCKS + OTHER)


def test_lines_come_once_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(check_command.time, "monotonic", lambda: now[0])
    with check_command.progress("checking", quiet=False) as tell:
        for step in range(100):
            now[0] = step * 0.25
            tell(step * 1_000_000, 100_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 24
    assert lines[3] == "checking: 16%, 4 MB/s"


def test_names_of_damage_are_all_provoked() -> None:
    provoked = {kind for _, damage, _ in HARMS for kind in damage} | {"unreadable_block"}
    assert provoked == set(DAMAGE)

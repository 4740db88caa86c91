"""Clients that read in the arena and store copies there, killed and frozen for real, as is their
daemon: what counts as read is always what was committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess, EngineProcess
from tests.system.test_daemon_process import leases

BLOCKS = 6
WHOLE = {"blocks": BLOCKS, "counts": True, "wrong": 0}
SMALL_ARENA = ("--cpu-memory-size-gb", "0.004", "--slab-bytes", "1048576")


def reader(daemon: DaemonProcess, expiry_s: float = 0.0) -> EngineProcess:
    return EngineProcess(daemon.address, str(expiry_s), program="arena_reader")


def stored(engine: EngineProcess, seed: int, *, durable: bool = False) -> None:
    """Once the arena has room: it is made while the daemon serves already."""
    assert engine.ask(do="attach")["attached"]

    def adopted() -> bool:
        found = engine.ask(do="copy", seed=seed, blocks=BLOCKS, durable=durable)
        assert "results" in found, found
        return set(found["results"]) <= {0, 1} and bool(found["durable"]) is durable

    wait_until(adopted, 20)


@pytest.fixture
def disk_daemon(tmp_path: Path) -> DaemonProcess:
    disk = ("--disk-path", str(tmp_path / "disk"), "--disk-size-gb", "0.064")
    return DaemonProcess(tmp_path, *disk)


def used_up(engine: EngineProcess, daemon: DaemonProcess) -> None:
    """All of the arena that nobody has leased holds other blocks than before."""
    assert engine.ask(do="attach")["attached"]
    with daemon.admin() as admin:
        admin.evict("cpu")
        tier = next(each for each in admin.stats().tiers if each.tier == "cpu")
    pages = tier.capacity_bytes // 2048  # more than there are: a page has a header too
    for seed in range(1000, 1000 + pages // 32):
        assert engine.ask(do="copy", seed=seed, blocks=32)["results"]


def test_a_reader_that_was_frozen_past_its_expiry_takes_no_wrong_bytes_for_right(
    tmp_path: Path,
) -> None:
    with (
        DaemonProcess(tmp_path, sizes=SMALL_ARENA) as daemon,
        reader(daemon) as frozen,
        reader(daemon) as other,
    ):
        stored(frozen, 1)
        assert frozen.ask(do="lease", id="a", seed=1, blocks=BLOCKS) == WHOLE
        frozen.tell(do="read_on", id="a")
        assert frozen.answer() == {}
        frozen.freeze()  # in the middle of a read, mostly
        print(f"leases back after {wait_until(lambda: leases(daemon) == 0, 5):.2f} s")
        used_up(other, daemon)
        frozen.thaw()
        found = frozen.answer()
        print(found)
        assert found["wrong"] == 0
        wait_until(
            lambda: frozen.ask(do="status") == {"state": "attached", "detached": ["silent"]}, 5
        )
        assert frozen.ask(do="read", id="a") == {"counts": False, "wrong": 0}  # for ever
        stored(frozen, 1)
        assert frozen.ask(do="lease", id="b", seed=1, blocks=BLOCKS) == WHOLE


def test_who_asks_for_a_longer_expiry_keeps_its_leases_while_others_lose_theirs(
    tmp_path: Path,
) -> None:
    with (
        DaemonProcess(tmp_path, sizes=SMALL_ARENA) as daemon,
        reader(daemon, 30.0) as patient,
        reader(daemon) as other,
        reader(daemon) as third,
    ):
        for engine in (patient, other):
            stored(engine, 1)
            assert engine.ask(do="lease", id="a", seed=1, blocks=BLOCKS) == WHOLE
            engine.freeze()
        wait_until(lambda: leases(daemon) == 1, 6)
        used_up(third, daemon)
        patient.thaw()
        other.thaw()
        assert patient.ask(do="read", id="a") == {"counts": True, "wrong": 0}
        assert patient.ask(do="status")["detached"] == []
        assert other.ask(do="read", id="a") == {"counts": False, "wrong": 0}


def test_a_reader_killed_in_the_middle_of_a_read_leaves_nothing_behind(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, reader(daemon) as killed, reader(daemon) as other:
        stored(killed, 1)
        for each in ("a", "b"):
            assert killed.ask(do="lease", id=each, seed=1, blocks=BLOCKS) == WHOLE
        killed.tell(do="read_on", id="a")
        assert killed.answer() == {}
        killed.kill()
        print(f"leases back after {wait_until(lambda: leases(daemon) == 0, 2):.3f} s")
        assert other.ask(do="attach")["attached"]
        assert other.ask(do="lease", id="a", seed=1, blocks=BLOCKS) == WHOLE


def test_a_client_killed_while_it_commits_copies_leaves_no_half_block(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, reader(daemon) as other:
        stored(other, 1)
        for number in range(4):
            with reader(daemon) as killed:
                stored(killed, 100 * number + 100)
                for seed in range(20):
                    killed.tell(do="copy", seed=100 * number + seed, blocks=32)
                killed.answer()
                killed.kill()
            for seed in range(20):
                found = other.ask(do="lease", id="a", seed=100 * number + seed, blocks=32)
                assert (found["counts"], found["wrong"]) == (True, 0)
                other.ask(do="release", id="a")
        with daemon.admin() as admin:
            tier = next(each for each in admin.stats().tiers if each.tier == "cpu")
        assert tier.private_pages == 0


def test_bytes_stay_right_when_the_daemon_is_killed_under_a_reader(
    disk_daemon: DaemonProcess,
) -> None:
    """The arena that it had outlives the daemon, with what was leased in it; the next daemon has
    another."""
    with disk_daemon as daemon, reader(daemon) as engine:
        stored(engine, 1, durable=True)
        assert engine.ask(do="lease", id="a", seed=1, blocks=BLOCKS) == WHOLE
        for _ in range(2):
            daemon.kill()
            assert engine.ask(do="read", id="a") == {"counts": True, "wrong": 0}
            wait_until(lambda: engine.ask(do="status")["state"] == "detached", 2)
            assert engine.ask(do="read", id="a")["wrong"] == 0
            assert engine.ask(do="lease", id="b", seed=1, blocks=BLOCKS)["error"] == "Detached"
            daemon.start()
            wait_until(lambda: engine.ask(do="status")["state"] == "attached", 5)
            assert engine.ask(do="lease", id="b", seed=1, blocks=BLOCKS) == WHOLE
            assert engine.ask(do="read", id="a")["wrong"] == 0


def test_copies_that_were_acknowledged_survive_a_daemon_that_is_killed_under_them(
    disk_daemon: DaemonProcess,
) -> None:
    with disk_daemon as daemon, reader(daemon) as engine:
        stored(engine, 1)
        first = 100
        for _ in range(3):
            engine.tell(do="copy_on", first=first, blocks=8)
            assert engine.answer() == {}
            with daemon.admin() as admin:  # some have been acknowledged
                before = admin.stats().blocks
                wait_until(lambda b=before, a=admin: a.stats().blocks > b + 40, 20)
            daemon.kill()
            found = engine.answer()
            print(found)
            assert found["error"] in ("Detached", "Unreachable")
            wait_until(lambda: engine.ask(do="status")["state"] == "detached", 5)
            daemon.start()
            wait_until(lambda: engine.ask(do="status")["state"] == "attached", 5)
            for seed in range(first, first + found["acknowledged"] + 1):
                there = engine.ask(do="lease", id="a", seed=seed, blocks=8)
                assert (there["counts"], there["wrong"]) == (True, 0)
                assert there["blocks"] == 8 or seed == first + found["acknowledged"]
                engine.ask(do="release", id="a")
            first += 100

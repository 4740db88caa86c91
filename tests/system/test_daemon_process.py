"""The daemon as a process, with engines as processes: who dies or freezes, and what is left."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvc2.cache.sessions import EXPIRY_S
from kvc2.client import Admin
from tests.doubles.waiting import wait_until
from tests.system.daemon import SMALL, DaemonProcess, EngineProcess


def leases(daemon: DaemonProcess) -> int:
    with daemon.admin() as admin:
        return admin.stats().leases


def cpu_blocks(admin: Admin) -> int:
    return next(each.resident_pages for each in admin.stats().tiers if each.tier == "cpu")


def store(engine: EngineProcess, blocks: int = 6) -> None:
    found = engine.ask(do="acquire", id="first", tokens=blocks * 16 + 4, grant=blocks)
    assert "error" not in found, found
    assert engine.ask(do="commit", id="first", blocks=blocks) == {"results": [0] * blocks}


@pytest.fixture
def disk_daemon(tmp_path: Path) -> DaemonProcess:
    return DaemonProcess(tmp_path, "--disk-path", str(tmp_path / "disk"), "--disk-size-gb", "0.064")


def test_it_starts_small(disk_daemon: DaemonProcess) -> None:
    with disk_daemon as daemon:
        memory = psutil.Process(daemon.pid).memory_info()
        beside = memory.rss - memory.shared
        print(f"start {daemon.start_s:.2f} s, {beside / 2**20:.0f} MiB beside shared memory")
        assert beside < 100 << 20
        assert stat.S_IMODE(os.stat(daemon.folder / "kvc2.sock").st_mode) == 0o600
        assert stat.S_IMODE(os.stat(daemon.folder / "kvc2.sock.side").st_mode) == 0o600


def test_a_prefix_comes_back_from_every_tier(disk_daemon: DaemonProcess) -> None:
    with disk_daemon as daemon, EngineProcess(daemon.address) as engine:
        assert engine.ask(do="attach")["attached"]
        store(engine)
        hit = engine.ask(do="acquire", id="gpu", tokens=100)
        assert (hit["tiers"], hit["bytes"]) == ([96, 0, 0], list(range(6)))
        engine.ask(do="release", id="first")
        engine.ask(do="release", id="gpu")
        with daemon.admin() as admin:
            assert admin.flush(10).durable_blocks == 6
            assert admin.evict("gpu").evicted_blocks == 6
        hit = engine.ask(do="acquire", id="cpu", tokens=100)
        assert (hit["tiers"], hit["bytes"]) == ([0, 96, 0], list(range(6)))
        engine.ask(do="release", id="cpu")
        with daemon.admin() as admin:
            admin.evict("gpu")
            admin.evict("cpu")
        hit = engine.ask(do="acquire", id="disk", tokens=100)
        assert (hit["tiers"], hit["bytes"]) == ([0, 0, 96], list(range(6)))


def test_the_disk_is_warm_after_kill_9_of_the_daemon(disk_daemon: DaemonProcess) -> None:
    with disk_daemon as daemon, EngineProcess(daemon.address) as engine:
        assert engine.ask(do="attach")["attached"]
        store(engine)
        with daemon.admin() as admin:
            assert admin.flush(10).durable_blocks == 6
        daemon.kill()
        wait_until(lambda: engine.ask(do="status")["state"] == "detached", 2)
        assert engine.ask(do="acquire", id="no", tokens=100)["error"] == "Detached"
        daemon.start()
        took = wait_until(lambda: engine.ask(do="status")["state"] == "attached", 2)
        print(f"attached again {took:.2f} s after the daemon was back")
        assert engine.ask(do="status")["detached"] == ["dead"]
        hit = engine.ask(do="acquire", id="again", tokens=100)
        assert (hit["tiers"], hit["bytes"]) == ([0, 0, 96], list(range(6)))


def test_leases_of_a_killed_engine_are_back_at_once(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, EngineProcess(daemon.address) as engine:
        assert engine.ask(do="attach")["attached"]
        store(engine)
        assert leases(daemon) == 1
        engine.kill()
        print(f"leases back after {wait_until(lambda: leases(daemon) == 0, 1):.3f} s")


def test_a_frozen_engine_expires_and_is_refused_when_it_thaws(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, EngineProcess(daemon.address) as engine:
        assert engine.ask(do="attach")["attached"]
        store(engine)
        engine.freeze()
        took = wait_until(lambda: leases(daemon) == 0, 4)
        print(f"leases back after {took:.2f} s")
        # the commit is written to its pipe before it thaws: it is the first thing that it does
        engine.tell(do="commit", id="first", blocks=6)
        engine.thaw()
        refused = engine.answer()
        assert refused["error"] in ("Detached", "NotFound"), refused
        wait_until(lambda: engine.ask(do="status")["sessions"] == 2, 4)
        assert engine.ask(do="status")["detached"] == ["silent"]


def test_an_engine_whose_python_stands_still_keeps_its_session_and_its_leases(
    tmp_path: Path,
) -> None:
    with DaemonProcess(tmp_path) as daemon, EngineProcess(daemon.address) as engine:
        assert engine.ask(do="attach")["attached"]
        store(engine)
        assert engine.ask(do="hold", seconds=round(2 * EXPIRY_S)) == {}
        assert leases(daemon) == 1
        hit = engine.ask(do="acquire", id="again", tokens=100)
        assert (hit["tiers"], hit["bytes"]) == ([96, 0, 0], list(range(6)))
        status = engine.ask(do="status")
        assert (status["sessions"], status["detached"]) == (1, [])


@pytest.mark.parametrize("end", ["freeze", "kill"])
def test_only_a_dead_engines_uncopied_blocks_are_copied_after_its_session(
    tmp_path: Path, end: str
) -> None:
    with (
        DaemonProcess(tmp_path, "--write-policy", "back") as daemon,
        EngineProcess(daemon.address) as engine,
    ):
        assert engine.ask(do="attach")["attached"]
        store(engine)
        getattr(engine, end)()
        wait_until(lambda: leases(daemon) == 0, 5)
        with daemon.admin() as admin:
            lost = "faults_total{kind=undemoted_lost}"
            if end == "kill":
                wait_until(lambda: cpu_blocks(admin) == 6, 5)
                assert admin.stats().counters[lost] == 0
            else:
                wait_until(lambda: admin.stats().counters[lost] == 6, 5)
                assert cpu_blocks(admin) == 0


def test_a_frozen_daemon_is_silent_not_dead(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, EngineProcess(daemon.address) as engine:
        assert engine.ask(do="attach")["attached"]
        daemon.freeze()
        wait_until(lambda: engine.ask(do="status")["state"] == "silent", 5)
        daemon.thaw()
        wait_until(lambda: engine.ask(do="status")["state"] == "attached", 5)
        assert engine.ask(do="status")["detached"] == ["silent"]
        daemon.freeze()
        wait_until(lambda: engine.ask(do="status")["state"] == "silent", 5)
        daemon.kill()
        wait_until(lambda: engine.ask(do="status")["state"] == "detached", 2)
        assert engine.ask(do="status")["detached"] == ["silent", "silent", "dead"]


def test_sigterm_flushes_and_exits_0(disk_daemon: DaemonProcess) -> None:
    with disk_daemon as daemon, EngineProcess(daemon.address) as engine:
        assert engine.ask(do="attach")["attached"]
        store(engine)
        assert daemon.stop() == 0, daemon.tail()
        assert "stopped durable=6 not_durable=0" in daemon.tail()
        assert not (daemon.folder / "kvc2.sock").exists()
        daemon.start()
        wait_until(lambda: engine.ask(do="status")["state"] == "attached", 2)
        assert engine.ask(do="acquire", id="again", tokens=100)["tiers"] == [0, 0, 96]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvc2", *arguments], capture_output=True, text=True, timeout=30
    )


def test_a_second_daemon_on_the_same_socket_refuses_to_start(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        second = run("serve", "--listen", daemon.address, *SMALL)
        assert second.returncode == 1
        assert "another daemon serves here" in second.stderr
        assert daemon.serves()


def test_the_commands_talk_to_a_daemon_and_drain_ends_it(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        at = ("--address", daemon.address)
        found = json.loads(run("stats", "--json", *at).stdout)
        assert found["leases"] == 0
        assert {each["tier"] for each in found["tiers"]} == {"gpu", "cpu"}
        assert "cpu" in run("stats", *at).stdout
        assert run("flush", *at).returncode == 0
        assert run("evict", "--tier", "cpu", *at).returncode == 0
        assert run("drain", *at).returncode == 0
        wait_until(lambda: not daemon.serves(), 5)
        assert run("stats", *at).returncode == 1

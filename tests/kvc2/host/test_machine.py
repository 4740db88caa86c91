"""What there is of memory and disk, and that nothing is asked of a machine that it can't have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import serve as engine_serve
from engine.settings import EngineConfig
from kvc2.commands.serve import check_fits
from kvc2.errors import InvalidConfig
from kvc2.host import machine
from kvc2.host.machine import GB, Room
from tests.system.engine import small_model

START_S = 60.0


def made(root: Path, *, available_kb: int, cgroup: str, files: dict[str, str]) -> Path:
    """A root with /proc and /sys as Linux shows them."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 2000 kB\nMemAvailable:  {available_kb} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_memory_is_the_machines_without_a_cgroup(tmp_path: Path) -> None:
    root = made(tmp_path, available_kb=1000, cgroup="0::/\n", files={})
    assert machine.memory(root) == Room("this machine", 2000 * 1024, 1000 * 1024)
    (tmp_path / "proc/self/cgroup").unlink()
    assert machine.memory(root) == Room("this machine", 2000 * 1024, 1000 * 1024)


def test_the_lowest_limit_above_this_process_counts(tmp_path: Path) -> None:
    files = {
        "a/memory.max": "400000",
        "a/memory.current": "100000",
        "a/b/memory.max": "500000",
        "a/b/memory.current": "450000",
        "a/b/c/memory.max": "max",
        "a/b/c/memory.current": "0",
        "other/memory.max": "1",
        "other/memory.current": "1",
    }
    root = made(tmp_path, available_kb=1000, cgroup="0::/a/b/c\n", files=files)
    assert machine.memory(root) == Room(f"the cgroup {root}/sys/fs/cgroup/a", 400_000, 50_000)


def test_cpus_are_what_affinity_and_the_lowest_quota_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6, 7})
    files = {
        "a/cpu.max": "250000 100000",
        "a/b/cpu.max": "max 100000",
        "cpu/c/cpu.cfs_quota_us": "-1",
        "cpu/c/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "10000",
        "cpu/cpu.cfs_period_us": "100000",
    }
    root = made(tmp_path, available_kb=1000, cgroup="0::/a/b\n", files=files)
    assert machine.cpus(root) == 3
    for cgroup, found in (("0::/other\n", 6), ("3:cpu,cpuacct:/c\n", 1)):
        (root / "proc/self/cgroup").write_text(cgroup)
        assert machine.cpus(root) == found


def test_limits_of_version_1_count_too(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712",  # none
        "memory/memory.usage_in_bytes": "400000",
        "memory/x/memory.limit_in_bytes": "300000",
        "memory/x/memory.usage_in_bytes": "400000",
    }
    lines = "4:memory:/x\n1:cpu,cpuacct:/y\n0::/\n"
    root = made(tmp_path, available_kb=1000, cgroup=lines, files=files)
    assert machine.memory(root) == Room(f"the cgroup {root}/sys/fs/cgroup/memory/x", 300_000, 0)


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    files = {"memory.max": "300000", "memory.current": "100000"}
    root = made(tmp_path, available_kb=1000, cgroup="0::/outside/of/it\n", files=files)
    assert machine.memory(root) == Room(f"the cgroup {root}/sys/fs/cgroup", 300_000, 200_000)


def test_what_a_folder_takes_is_available_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "not/yet"
    before = machine.disk(missing, missing / "slabs")
    assert before.owner == f"the file system of {tmp_path}"
    facts = os.statvfs(tmp_path)
    assert before.total_bytes == facts.f_blocks * facts.f_frsize
    (missing / "slabs/one").mkdir(parents=True)
    for name in ("slabs/0", "slabs/one/0", "0"):
        (missing / name).write_bytes(bytes(1 << 20))
        with (missing / name).open("rb") as file:
            os.fsync(file.fileno())  # the blocks are there once it is written
    free = 7 << 20
    same = os.statvfs_result((4096, 4096, 1 << 20, 0, free // 4096, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: same)
    room = machine.disk(missing, missing / "slabs")
    taken = sum((missing / name).stat().st_blocks * 512 for name in ("slabs/0", "slabs/one/0"))
    assert taken >= 2 << 20
    assert room.total_bytes == 4 << 30
    assert room.available_bytes == 7 * (1 << 20) + taken


def test_the_daemon_refuses_what_can_never_fit_and_tells_what_does_not_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    monkeypatch.setattr("kvc2.events.warning", lambda name, **facts: told.append((name, facts)))
    room = Room("this machine", 20 * GB, 5 * GB)
    check_fits("cpu.memory_size_gb", 5.0, room)
    assert not told
    check_fits("cpu.memory_size_gb", 20.0, room)
    facts = {"key": "cpu.memory_size_gb", "gb": 20.0, "free_gb": 5.0}
    assert told == [("more_than_free", facts)]
    with pytest.raises(InvalidConfig, match=r"^cpu\.memory_size_gb = 20\.5: .*this machine has 20"):
        check_fits("cpu.memory_size_gb", 20.5, room)


def test_the_engine_refuses_what_can_never_fit_and_tells_what_does_not_now(
    caplog: pytest.LogCaptureFixture,
) -> None:
    room = Room("this machine", 20 * GB, 5 * GB)
    by_size = EngineConfig(model=Path("m"), kv_memory_gb=18.0)
    by_pages = EngineConfig(model=Path("m"), num_pages=1000)
    engine_serve.check_room(by_size, 2 * GB, 3 * GB, room)
    assert not caplog.records
    engine_serve.check_room(by_size, 18 * GB, 2 * GB, room)
    (line,) = caplog.messages
    assert "kv_memory_gb = 18.0: the pool takes 18.000 GB, the weights 2.000 GB" in line
    with pytest.raises(InvalidConfig, match=r"^kv_memory_gb = 18\.0: .*this machine has 20"):
        engine_serve.check_room(by_size, 18 * GB, 3 * GB, room)
    with pytest.raises(InvalidConfig, match=r"^num_pages = 1000: .*this machine has 20"):
        engine_serve.check_room(by_pages, 18 * GB, 3 * GB, room)
    with pytest.raises(InvalidConfig, match=r"the weights 2\.000 GB, graphs 1\.000 GB, and this"):
        engine_serve.check_room(by_size, 18 * GB, 2 * GB, room, 1 * GB)
    with pytest.raises(InvalidConfig, match=r"^model = '.*m': .*the weights 21\.000 GB"):
        engine_serve.check_room(by_size, 1 * GB, 21 * GB, room)


def refused(command: list[str], *, inside: Path | None = None) -> str:
    """The last line of a command that ends with exit code 2; `inside` this cgroup."""
    if inside is not None:
        join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        command = ["sh", "-ec", join, str(inside), *command]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def serve(tmp_path: Path, *flags: str) -> list[str]:
    listen = ("--listen", f"unix:{tmp_path}/kvc2.sock")
    return [sys.executable, "-m", "kvc2", "serve", *listen, *flags]


def test_kvc2_serve_ends_with_2(tmp_path: Path) -> None:
    line = refused(serve(tmp_path, "--cpu-memory-size-gb", "900000"))
    assert line.startswith("kvc2: cpu.memory_size_gb = 900000.0")
    small = ("--cpu-memory-size-gb", "0.016", "--slab-bytes", "1048576")
    on_disk = ("--disk-path", str(tmp_path / "disk"), "--disk-size-gb", "9000000")
    line = refused(serve(tmp_path, *small, *on_disk))
    assert line.startswith("kvc2: disk.size_gb = 9000000.0")
    assert f"the file system of {tmp_path}" in line


def test_kvc2_engine_serve_ends_with_2(tmp_path: Path) -> None:
    model = str(small_model(tmp_path / "model"))
    command = [sys.executable, "-m", "engine", "serve", "--model", model, "--port", "0"]
    for flag, field in (("--kv-memory-gb", "kv_memory_gb"), ("--num-pages", "num_pages")):
        line = refused([*command, flag, "900000000"])
        assert line.startswith(f"kvc2-engine: {field} = 900000000")
        assert "GB" in line


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup of 256 MB below our own, where this process may make one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        two = controllers == "" and Path("/sys/fs/cgroup/cgroup.controllers").exists()
        if not two and controllers != "memory":
            continue
        mount = Path("/sys/fs/cgroup" if two else "/sys/fs/cgroup/memory")
        folder = mount / path.strip("/") / f"kvc2-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup can be made here: {error}")
        try:
            limit = folder / ("memory.max" if two else "memory.limit_in_bytes")
            limit.write_text(str(256 << 20))
        except OSError as error:
            folder.rmdir()
            pytest.skip(f"no limit of memory can be set here: {error}")
        yield folder
        folder.rmdir()
        return
    pytest.skip("this process is in no cgroup of memory")


def test_a_real_cgroups_limit_is_named(tmp_path: Path, small_cgroup: Path) -> None:
    line = refused(serve(tmp_path, "--cpu-memory-size-gb", "0.5"), inside=small_cgroup)
    assert line.startswith("kvc2: cpu.memory_size_gb = 0.5")
    assert f"the cgroup {small_cgroup} has 0.268 GB" in line

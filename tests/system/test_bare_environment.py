"""Both processes where little is given: a user without a name, a home or a cache; a file system
that can't be written; ports that are taken."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from tests.system.engine import small_model

START_S = 60.0
PATH = {"PATH": "/usr/bin:/bin"}  # the whole environment
NAMELESS = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
READ_ONLY = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")
SEALED = 'mount --bind "$0" "$0"; mount -o remount,bind,ro /; exec "$@"'  # all but one folder
SMALL = ("--cpu-memory-size-gb", "0.016", "--slab-bytes", "1048576")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("bare") / "small")


@pytest.fixture(params=["nameless", "read-only"])
def wrapped(request: pytest.FixtureRequest, tmp_path: Path) -> Sequence[str]:
    """What runs a command as a user without a passwd entry, or where only tmp_path is writable."""
    wrapper = NAMELESS if request.param == "nameless" else (*READ_ONLY, SEALED, str(tmp_path))
    needed = shutil.which("unshare")
    tried = needed and subprocess.run([*wrapper, "true"], capture_output=True, text=True)
    if not tried or tried.returncode:
        pytest.skip(f"no namespaces of one's own here: {tried and tried.stderr.strip()}")
    return wrapper


class Started:
    """A command, until the line that says it serves; stopped in order at the end."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "serving" in line:
                return
        raise AssertionError("".join(self.lines))

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            rest, _ = self.process.communicate(timeout=START_S)
        finally:
            self.process.kill()
        assert self.process.returncode == 0, "".join([*self.lines, rest])
        assert "Traceback" not in rest


def daemon(folder: Path, *flags: str) -> list[str]:
    listen = ("--listen", f"unix:{folder / 'kvc2.sock'}")
    return [sys.executable, "-m", "kvc2", "serve", *listen, *SMALL, *flags]


def test_daemon_and_engine_serve(wrapped: Sequence[str], tmp_path: Path, model: Path) -> None:
    command = [sys.executable, "-m", "engine", "serve", "--model", str(model), "--port", "0"]
    command += ["--num-pages", "64", "--threads", "1", "--kvc2", f"unix:{tmp_path}/kvc2.sock"]
    on_disk = ("--disk-path", str(tmp_path / "disk"), "--disk-size-gb", "0.064")
    with (
        Started([*wrapped, *daemon(tmp_path, *on_disk)], PATH),
        Started([*wrapped, *command], PATH) as engine,
    ):
        url = next(word for word in engine.lines[-1].split() if word.startswith("http://"))
        body = {"model": "small", "prompt": "a", "max_tokens": 2}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=START_S)
        assert reply.status_code == 200, reply.text
        asked = [*wrapped, sys.executable, "-m", "kvc2", "stats", "--address"]
        told = subprocess.run(
            [*asked, f"unix:{tmp_path}/kvc2.sock"], env=PATH, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr


NOWHERE = "/proc/nowhere"  # nobody makes a folder there
COMMANDS = (
    ("kvc2", ("--help",), {0}),
    ("kvc2", ("stats", "--address", f"unix:{NOWHERE}/kvc2.sock"), {1}),
    ("kvc2", ("check", NOWHERE), {2}),
    ("kvc2", ("explain", "--text", NOWHERE, "--tokenizer", "~nobody/model"), {2}),
    ("kvc2", ("replay", f"{NOWHERE}.jsonl"), {2}),
    ("kvc2", ("serve", "--listen", f"unix:{NOWHERE}/kvc2.sock", *SMALL), {1}),
    ("kvc2", ("serve", "--disk-path", NOWHERE, "--disk-size-gb", "0.064", *SMALL), {1, 2}),
    ("kvc2", ("serve", "--disk-path", NOWHERE, *SMALL), {1, 2}),
    ("engine", ("--help",), {0}),
    ("engine", ("serve", "--model", NOWHERE), {1}),
    ("engine", ("serve", "--model", "~/model"), {1, 2}),  # root has a name, and no such model
    ("engine", ("make-demo-model", f"{NOWHERE}/demo"), {1}),
)


@pytest.mark.parametrize(("package", "flags", "codes"), COMMANDS, ids=lambda each: str(each)[:50])
def test_no_command_ends_with_a_traceback(
    wrapped: Sequence[str], tmp_path: Path, package: str, flags: Sequence[str], codes: set[int]
) -> None:
    ended = subprocess.run(
        [*wrapped, sys.executable, "-m", package, *flags],
        env=PATH | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert "Traceback" not in ended.stderr
    assert ended.returncode in codes, ended


def test_a_demo_model_without_a_home_needs_a_directory(tmp_path: Path) -> None:
    command = [*NAMELESS, sys.executable, "-m", "engine", "make-demo-model"]
    tried = subprocess.run([*NAMELESS, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no user namespaces here: {tried.stderr.strip()}")
    ended = subprocess.run(command, env=PATH, capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 2
    assert ended.stderr.startswith("kvc2-engine: directory: this user has no home")


def test_a_taken_port_is_refused_with_its_name(tmp_path: Path) -> None:
    """Of the daemon, as the engine's is (test_engine_start.py)."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags in (
            ("--listen", f"127.0.0.1:{port}"),
            ("--listen", f"unix:{tmp_path}/kvc2.sock", "--metrics-port", str(port)),
        ):
            ended = subprocess.run(
                [sys.executable, "-m", "kvc2", "serve", *SMALL, *flags],
                capture_output=True,
                text=True,
                timeout=START_S,
                env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
            )
            assert ended.returncode == 2, ended
            assert "Traceback" not in ended.stderr
            assert str(port) in ended.stderr.splitlines()[-1]
            assert "serving" not in ended.stderr

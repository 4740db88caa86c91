"""Builds the hostile driver (driver/) once, and says how a process comes to run on it: by the
environment of a subprocess, never of the tests' own process."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT

SOURCE = ROOT / "tests/cuda/driver"
BUILD = ROOT / "build/hostile"
BUILD_LIMIT_S = 240


def build() -> Path:
    """The folder in which it lies as libcuda.so.1; KVC2_HOSTILE names one that is built already."""
    if given := os.environ.get("KVC2_HOSTILE"):
        return Path(given)
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja"]
        for command in (configure, ["cmake", "--build", BUILD]):
            done = subprocess.run(
                [str(word) for word in command],
                capture_output=True,
                text=True,
                timeout=BUILD_LIMIT_S,
            )
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD


def environment(words: str = "", **more: str) -> dict[str, str]:
    """Of a process that finds the hostile driver where it looks for a real one. `words`: how
    hostile it is (driver/README.md)."""
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(build()),
        "HOSTILE": words,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **more,
    }


def run(*words: str, hostile: str = "", limit_s: float = 120, **more: str) -> str:
    """What a Python process on the hostile driver prints. AssertionError, with all of that, where
    it fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(hostile, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout

"""The laws see each bug of bugs.py: tests/crash/planted.py plants them, some minutes a file."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT
from tests.cuda.bugs import CUDA_BUGS

FILES = sorted({bug.file for bug in CUDA_BUGS})


def test_there_are_enough_of_them() -> None:
    assert len(CUDA_BUGS) >= 20
    assert len({bug.name for bug in CUDA_BUGS}) == len(CUDA_BUGS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", FILES)
def test_each_bug_of_what_calls_cuda_is_seen(file: str) -> None:
    planted = [sys.executable, "-m", "tests.crash.planted", "--only", f"{file}:"]
    done = subprocess.run(planted, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sum(bug.file == file for bug in CUDA_BUGS)} planted, 0 survive" in done.stdout

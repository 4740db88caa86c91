"""Freed memory stays with the process that asked for that."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from kvc2.host.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def turn():
    a, b = bytes(range(256)) * 4097, bytes(range(256)) * 4098  # 1 MiB and a little
    del a, b
for _ in range(10):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no mallopt: no glibc")
def test_what_two_messages_took_is_there_for_the_next_two() -> None:
    assert faults("kept") < 100 < 10_000 < faults("as it is")

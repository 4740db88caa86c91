"""What this machine's memory and arithmetic units give, on all its cores: the limits that kernels
are compared with in their own run (unit_probe.cpp).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Streams and bytes ahead; which is fastest differs between machines, and between hours.
WAYS_TO_READ = ((1, 0), (2, 1024), (4, 1024))


@dataclass(frozen=True)
class Unit:
    """An instruction that multiplies, and `rounds` of it: some 10 ms."""

    name: str
    function: str
    rounds: int
    multiplies: Literal["bf16", "int8"]


UNITS = (
    Unit("vdpbf16ps", "bf16_products", 2_000_000, "bf16"),
    Unit("vpdpbusd", "byte_products", 2_000_000, "int8"),
    Unit("tdpbf16ps", "bf16_tiles", 200_000, "bf16"),
    Unit("tdpbusd", "byte_tiles", 200_000, "int8"),
)


def fastest(rates: dict[str, float], multiplied: Literal["bf16", "int8"]) -> tuple[str, float]:
    """The best of `rates` that multiplies these; NaN where the machine lacks all of them."""
    name = max(
        (unit.name for unit in UNITS if unit.multiplies == multiplied), key=rates.__getitem__
    )
    return name, rates[name] or float("nan")


class UnitProbe:
    """Compiled once. Each call runs on `threads` threads, and returns what all of them reached."""

    def __init__(self, threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "unit_probe.so"
            source = Path(__file__).with_name("unit_probe.cpp")
            command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source]
            subprocess.run(command, check=True)
            self._library = ctypes.CDLL(str(library))
        size, address = ctypes.c_size_t, ctypes.c_void_p
        self._library.read_streams.argtypes = [address, size, ctypes.c_int, size]
        for unit in UNITS:
            function = getattr(self._library, unit.function)
            function.argtypes, function.restype = [size], ctypes.c_double
        self.threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.threads)

    def read_gb_per_s(self, address: int, num_bytes: int) -> float:
        """The best of several ways to read this memory."""
        part = num_bytes // self.threads // 512 * 512
        aligned = (address + 63) // 64 * 64
        if aligned + part * self.threads > address + num_bytes:
            part -= 512
        best = 0.0
        for streams, ahead in WAYS_TO_READ:
            begin = time.perf_counter()
            list(
                self._pool.map(
                    lambda i: self._library.read_streams(aligned + i * part, part, streams, ahead),  # noqa: B023
                    range(self.threads),
                )
            )
            best = max(best, part * self.threads / (time.perf_counter() - begin) / 1e9)
        return best

    def rates(self) -> dict[str, float]:
        """By a unit's instruction, 1e12 operations a second; 0 where the machine lacks it."""
        return {unit.name: self._rate(unit) for unit in UNITS}

    def _rate(self, unit: Unit) -> float:
        function = getattr(self._library, unit.function)
        begin = time.perf_counter()
        done = sum(self._pool.map(lambda _: function(unit.rounds), range(self.threads)))
        return done / (time.perf_counter() - begin) / 1e12

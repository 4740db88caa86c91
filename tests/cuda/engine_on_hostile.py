"""`kvc2-engine` whose pool lies in the hostile driver's memory: it computes on the CPU, through a
map of the descriptor that stands for the device's memory, which only the hostile driver gives.
"""

from __future__ import annotations

import mmap

import engine.serve
from engine.cli import main
from kvc2.cuda.memory import DeviceMemory


class HostileMemory(DeviceMemory):
    """A device's memory, to the daemon and to the driver; CPU memory to the engine."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.map = memoryview(mmap.mmap(self.fd, num_bytes))


def hostile_memory(num_bytes: int, ordinal: int | None) -> HostileMemory:
    return HostileMemory(num_bytes)


if __name__ == "__main__":
    engine.serve.pool_memory = hostile_memory
    main()

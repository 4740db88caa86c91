"""`kvc2-engine` whose pool lies in the hostile driver's memory: it computes on the CPU, through a
map of the descriptor that stands for the device's memory, which only the hostile driver gives.

With `--device cuda` it is put together as on a GPU, on CPU tensors: torch's products, flashinfer's
stand-in (which computes in float32 too, so that tokens can be compared), graphs and the side stream
of cold experts on a tape.
"""

from __future__ import annotations

import dataclasses
import mmap
import sys

import engine.device
import engine.serve
from engine.attention.flashinfer import FlashInferAttention
from engine.cli import main
from engine.device import CPU, Device, cuda
from kvc2.cuda.memory import DeviceMemory
from tests.engine import flashinfer_stand_in
from tests.engine.graph_tape import TapeRecorder, TapeSideStream

chosen = engine.device.chosen


class HostileMemory(DeviceMemory):
    """A device's memory, to the daemon and to the driver; CPU memory to the engine."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.map = memoryview(mmap.mmap(self.fd, num_bytes))


def hostile_memory(num_bytes: int, ordinal: int | None) -> HostileMemory:
    return HostileMemory(num_bytes)


def as_on_a_device(name: str, split_pages: int) -> Device:
    if name != "cuda":
        return chosen(name)
    recorder = TapeRecorder()
    return dataclasses.replace(
        cuda(0, split_pages),
        memory=CPU.memory,
        attention=lambda pool, heads: FlashInferAttention(pool, heads, split_pages),
        empty=CPU.empty,
        over=CPU.over,
        room=CPU.room,
        finish=CPU.finish,
        recorder=lambda: recorder,
        side_stream=lambda: TapeSideStream(recorder),
    )


if __name__ == "__main__":
    version = max(flashinfer_stand_in.SIGNATURES)
    flashinfer_stand_in.PagedPrefill.TYPES += (flashinfer_stand_in.torch.float32,)
    sys.modules["flashinfer"] = flashinfer_stand_in.stand_in(version)
    engine.serve.pool_memory = hostile_memory
    engine.serve.chosen = as_on_a_device
    main()

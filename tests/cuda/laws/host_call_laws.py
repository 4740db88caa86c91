"""A stream calls the engine's Python between its copies, as cold experts beside a GPU need it: on
the hostile driver, and on a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from engine.graphs import HostFunctions
from kvc2.cuda.driver import Gpu, ask, cu
from kvc2.cuda.faults import CudaFault
from kvc2.cuda.memory import DeviceMemory, Registered
from tests.cuda.laws.pools import PIECE, Bytes, Hostile, judged, shared

NUM_BYTES = 4096


@dataclass
class Bench:
    """A stream, memory of the device, and two pieces of pinned memory."""

    gpu: Gpu
    stream: object
    memory: DeviceMemory
    there: Bytes
    back: Bytes
    functions: HostFunctions

    def around(self, work: Callable[[], None]) -> None:
        """Device -> there, the host's work, back -> device."""
        address = self.memory.address
        ask(cu.cuMemcpyDtoHAsync, self.there.ctypes.data, address, NUM_BYTES, self.stream)
        self.functions.launch(work, int(self.stream))  # type: ignore[call-overload]
        ask(cu.cuMemcpyHtoDAsync, address, self.back.ctypes.data, NUM_BYTES, self.stream)

    def wait(self) -> Bytes:
        """What the device holds in the end."""
        ask(cu.cuStreamSynchronize, self.stream)
        found = np.empty(NUM_BYTES, np.uint8)
        ask(cu.cuMemcpyDtoH, found.ctypes.data, self.memory.address, NUM_BYTES)
        return found


@pytest.fixture
def driver() -> Iterator[Hostile | None]:
    with judged() as found:
        yield found


@pytest.fixture
def bench(driver: Hostile | None) -> Iterator[Bench]:
    gpu, arena = Gpu(0), shared(PIECE)
    registered = Registered(arena, PIECE)
    registered.ensure(np.zeros(1, np.uint64), 1)
    memory, stream = DeviceMemory(NUM_BYTES), gpu.stream()
    zeros = np.zeros(NUM_BYTES, np.uint8)
    ask(cu.cuMemcpyHtoD, memory.address, zeros.ctypes.data, NUM_BYTES)
    parts = arena[:NUM_BYTES], arena[NUM_BYTES : 2 * NUM_BYTES]
    yield Bench(gpu, stream, memory, *parts, HostFunctions())
    ask(cu.cuStreamDestroy, stream)
    registered.close()
    memory.close()
    gpu.close()


def test_the_host_works_between_copies_in_their_order(bench: Bench) -> None:
    """Nobody waits in between, and one function is called again and again."""
    seen: list[int] = []

    def one_more() -> None:
        seen.append(int(bench.there[0]))
        np.add(bench.there, 1, out=bench.back)

    for _ in range(40):
        bench.around(one_more)
    assert (bench.wait() == 40).all()
    assert seen == list(range(40))


def test_a_function_may_not_call_the_driver(bench: Bench, driver: Hostile | None) -> None:
    if driver is None:
        pytest.skip("a real driver may hang on it")
    refused: list[int] = []

    def asks() -> None:
        try:
            ask(cu.cuStreamQuery, bench.stream)
        except CudaFault as fault:
            refused.append(fault.code)

    bench.around(asks)
    bench.wait()
    assert refused == [800]
    assert "violation: cuStreamQuery in a host function" in driver.report()

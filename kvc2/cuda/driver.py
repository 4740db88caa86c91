"""A CUDA device through NVIDIA's own bindings of the driver API: contexts, streams, facts.

Only a worker (worker.py) and an engine import this, and never the daemon: importing it loads no
driver, but the first call does. Not here: memory (memory.py), copies (mover.py).
"""

from __future__ import annotations

import importlib
import uuid
from dataclasses import dataclass
from typing import Any

from kvc2.cuda.faults import CudaFault

cu: Any = importlib.import_module("cuda.bindings.driver")  # the extra `cuda`; it has no types


def ask(call: Any, *args: Any) -> Any:
    """A call's results without its status. Raises CudaFault for any but CUDA_SUCCESS."""
    status, *results = call(*args)
    if status != cu.CUresult.CUDA_SUCCESS:
        raise CudaFault(call.__name__, int(status), status.name)
    return results[0] if len(results) == 1 else results


@dataclass(frozen=True)
class Facts:
    """Of a device. `uuid` as nvidia-smi prints it, and as the wire has it."""

    uuid: str
    name: str


def facts(ordinal: int) -> Facts:
    """Of a device by its place among those that this process sees."""
    device = ask(cu.cuDeviceGet, ordinal)
    name = bytes(ask(cu.cuDeviceGetName, 96, device)).split(b"\0")[0]
    number = uuid.UUID(bytes=bytes(ask(cu.cuDeviceGetUuid, device).bytes))
    return Facts(f"GPU-{number}", name.decode(errors="replace"))


def devices() -> list[Facts]:
    """All that this process sees. Raises CudaFault, and RuntimeError where there is no driver."""
    ask(cu.cuInit, 0)
    return [facts(ordinal) for ordinal in range(ask(cu.cuDeviceGetCount))]


class Gpu:
    """A device's primary context, which torch uses too. `use` makes it the calling thread's.
    Raises CudaFault."""

    def __init__(self, ordinal: int) -> None:
        ask(cu.cuInit, 0)
        self.ordinal = ordinal
        self._device = ask(cu.cuDeviceGet, ordinal)
        self._context = ask(cu.cuDevicePrimaryCtxRetain, self._device)
        self.use()

    @staticmethod
    def of_uuid(wanted: str) -> Gpu:
        """Wherever it is among those that this process sees. LookupError: it is not."""
        for ordinal, each in enumerate(devices()):
            if each.uuid == wanted:
                return Gpu(ordinal)
        raise LookupError(f"no device {wanted} is seen here")

    def use(self) -> None:
        """On each thread, before it calls anything else."""
        ask(cu.cuCtxSetCurrent, self._context)

    @property
    def uuid(self) -> str:
        return facts(self.ordinal).uuid

    @property
    def max_pitch(self) -> int:
        """Of 2-D copies, bytes."""
        which = cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_PITCH
        return int(ask(cu.cuDeviceGetAttribute, which, self._device))

    def stream(self) -> Any:
        """One that waits for no default stream."""
        return ask(cu.cuStreamCreateWithPriority, cu.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)

    def event(self) -> Any:
        """Whoever waits for it sleeps, and doesn't spin."""
        flags = cu.CUevent_flags
        return ask(cu.cuEventCreate, flags.CU_EVENT_DISABLE_TIMING | flags.CU_EVENT_BLOCKING_SYNC)

    def close(self) -> None:
        ask(cu.cuDevicePrimaryCtxRelease, self._device)

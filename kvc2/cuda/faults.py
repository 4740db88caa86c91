"""What goes wrong between the daemon and a CUDA device. Imports nothing of CUDA."""

from __future__ import annotations

# A context is lost with these: illegal addresses, failed launches, memory that can't be corrected.
STICKY = frozenset({214, 220, 700, 714, 715, 716, 717, 718, 719, 721})


class CudaFault(Exception):
    """A call of the driver failed with this code of CUresult. `sticky`: the process can do nothing
    more with the device, and must end."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.code = code
        self.sticky = code in STICKY


class RefusedByWorker(Exception):
    """A worker could not do what it was asked; it goes on. What it was asked has not happened, or
    not whole."""


class WorkerLost(Exception):
    """A worker died, was poisoned or did not answer in time. It is dead when this is raised: it
    copies nothing any more, and its pools must be opened anew in another one."""


class NoWorker(Exception):
    """No worker can be started."""

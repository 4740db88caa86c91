"""Which threads yield the CPU: those whose work nobody waits for.

An engine on the CPU computes with as many threads as there are cores, which meet at each layer: a
copy behind that takes one core's turn holds up all of them.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

NICE = 10  # a tenth of another thread's share where both want a core; all of it where none does


def step_back() -> None:
    """The calling thread, and those that it starts from now on, run after others."""
    thread = threading.get_native_id()
    with suppress(OSError):  # a sandbox that forbids it: the copies are as they were
        os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))

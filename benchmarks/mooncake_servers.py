"""Mooncake Store as its users run it: its master, and a node that lends memory, as processes.

They open ports on every address: start them in a network of their own (own_network.py). Not here:
what is measured (remote.py) or judged (tests/peers/test_mooncake.py).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Process

MASTER_PORT, METRICS_PORT = 50051, 50052
NODE_BYTES = 512 << 20
NODE = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[1]), 16 << 20, "tcp", "", sys.argv[2])
print("set up:", code, flush=True)
while not code:
    time.sleep(60)
"""


@dataclass(frozen=True)
class Servers:
    master: Process
    node: Process
    url: str = f"mooncake://127.0.0.1:{MASTER_PORT}"


def site_packages(python: Path) -> Path:
    """Of an environment that has Mooncake, by its python: for PYTHONPATH, since a daemon runs its
    client by the Python that it has itself."""
    asked = "import mooncake, pathlib; print(pathlib.Path(mooncake.__file__).parent.parent)"
    return Path(subprocess.check_output([str(python), "-c", asked], text=True).strip())


@contextmanager
def servers(python: Path, folder: Path) -> Iterator[Servers]:
    """By the python of an environment that has Mooncake."""
    program = str(python.with_name("mooncake_master"))
    command = [program, f"--rpc_port={MASTER_PORT}", f"--metrics_port={METRICS_PORT}"]
    with ExitStack() as stack:
        master = stack.enter_context(_ending(Process("mooncake-master", command, folder)))
        master.wait_until(lambda: _listens(MASTER_PORT), "port of its master")
        node = Process(
            "mooncake-node",
            [str(python), "-c", NODE, str(NODE_BYTES), f"127.0.0.1:{MASTER_PORT}"],
            folder,
        )
        stack.enter_context(_ending(node))
        node.wait_until(lambda: "set up: 0" in node.log.read_text(), "node")
        yield Servers(master, node)


@contextmanager
def _ending(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        if process.child.poll() is None:
            process.kill()


def _listens(port: int) -> bool:
    """In this thread's network."""
    rows = Path("/proc/thread-self/net/tcp").read_text().splitlines()
    rows += Path("/proc/thread-self/net/tcp6").read_text().splitlines()
    ending = f":{port:04X}"
    return any(len(row.split()) > 3 and row.split()[1].endswith(ending) for row in rows)


def with_packages(folder: Path) -> dict[str, str]:
    """The environment of a daemon that finds Mooncake there."""
    found = {name: each for name, each in os.environ.items() if not name.startswith("MOONCAKE_")}
    return {**found, "PYTHONPATH": os.pathsep.join([str(folder), found.get("PYTHONPATH", "")])}

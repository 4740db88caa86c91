"""The steps of `make cuda-check` that measure: `python -m tests.cuda.measure STEP`.

One line a fact. Needs a driver in its process. AssertionError: a law broke.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from kvc2.cuda.driver import Gpu, ask, cu, devices
from kvc2.cuda.faults import CudaFault
from kvc2.cuda.memory import DeviceMemory, Registered, opened
from kvc2.cuda.mover import DevicePages, Mover
from kvc2.cuda.rows import GROUPS_MAX, groups
from tests import ROOT
from tests.cuda.check import NOT_RUN
from tests.cuda.laws import engine
from tests.cuda.laws.pools import Bytes, Shape, layer_major, side_by_side

GB = 1e9
PIECE = 64 << 20
SEAL_FUTURE_WRITE = 0x10
ARENA_BYTES = int(float(os.environ.get("KVC2_ARENA_GB", "4")) * GB) // (1 << 21) * (1 << 21)
HEADER_BYTES = 4096
REPEATS = 5
PRODUCTS = 200


def say(name: str, *values: object) -> None:
    print(f"{name:46}", *values, flush=True)


def median_s(work: Callable[[], object]) -> float:
    """Seconds, of REPEATS after one that is not counted."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times)[REPEATS // 2]


def arena(num_bytes: int) -> tuple[int, Bytes]:
    """A memfd, mapped and then sealed as the daemon's arena is, all of it there."""
    fd = os.memfd_create("check", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    memory = np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | SEAL_FUTURE_WRITE)
    memory[::4096] = 1
    return fd, memory


def facts() -> None:
    gpu = Gpu(0)
    say("driver", ask(cu.cuDriverGetVersion), "kernel", os.uname().release)
    for each in devices():
        say("device", each.uuid, each.name)
    kinds = cu.CUdevice_attribute
    wanted = {
        "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": 1,
        "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 1,
        "UNIFIED_ADDRESSING": 1,
        "ASYNC_ENGINE_COUNT": 2,
        "MAX_PITCH": 1 << 30,
        "HOST_REGISTER_SUPPORTED": 1,
    }
    for name, least in wanted.items():
        found = int(
            ask(cu.cuDeviceGetAttribute, getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), gpu._device)
        )
        say(name.lower(), found)
        assert found >= least, f"{name} is {found}: at least {least} is relied on"
    say("memlock limit", resource.getrlimit(resource.RLIMIT_MEMLOCK))


def registration() -> None:
    Gpu(0)
    fd, memory = arena(ARENA_BYTES)
    for piece in dict.fromkeys((min(PIECE, ARENA_BYTES), ARENA_BYTES)):
        registered = Registered(memory, piece)
        began = time.perf_counter()
        registered.ensure(np.arange(0, ARENA_BYTES, piece, np.uint64), 1)
        took = time.perf_counter() - began
        say(f"a sealed memfd in pieces of {piece >> 20} MiB", f"{took / ARENA_BYTES * GB:.3f} s/GB")
        registered.close()
    only_read = np.frombuffer(mmap.mmap(fd, ARENA_BYTES, prot=mmap.PROT_READ), np.uint8)
    flags = cu.CU_MEMHOSTREGISTER_READ_ONLY
    try:
        ask(cu.cuMemHostRegister, only_read.ctypes.data, ARENA_BYTES, flags)
        ask(cu.cuMemHostUnregister, only_read.ctypes.data)
        say("a map that can only be read, READ_ONLY", "taken")
    except CudaFault as fault:
        say("a map that can only be read, READ_ONLY", "REFUSED", fault)


def sharing() -> None:
    """What an engine's process made is read by its descriptor, before its death and after."""
    num_bytes = min(ARENA_BYTES, 1 << 28)
    gpu, theirs = Gpu(0), engine.start(num_bytes, 7)
    expected, found = engine.content(num_bytes, 7), np.empty(num_bytes, np.uint8)
    began = time.perf_counter()
    mapping = opened(gpu, theirs.memory_fd, num_bytes)
    say("opened in", f"{(time.perf_counter() - began) * 1e3:.1f} ms")
    ask(cu.cuMemcpyDtoH, found.ctypes.data, mapping.address, num_bytes)
    assert (found == expected).all(), "other bytes than the engine's"
    theirs.kill()
    found[:] = 0
    ask(cu.cuMemcpyDtoH, found.ctypes.data, mapping.address, num_bytes)
    assert (found == expected).all(), "other bytes after the engine was killed"
    say("the same bytes after kill -9", "yes")
    began = time.perf_counter()
    mapping.close()
    say("unmapped in", f"{(time.perf_counter() - began) * 1e3:.1f} ms")


class Pool:
    """A pool and an arena of as many pages, in random places."""

    def __init__(self, gpu: Gpu, shape: Shape, registered: Registered, num_bytes: int) -> None:
        step = HEADER_BYTES + shape.payload_bytes
        places = np.arange(0, num_bytes - step, step) + HEADER_BYTES
        whole = places // registered.piece == (places + shape.payload_bytes) // registered.piece
        random = np.random.default_rng(0)
        self.payloads = random.permutation(places[whole])[: shape.pages].astype(np.uint64)
        self.pages = random.permutation(shape.pages)[: self.payloads.size].astype(np.uint32)
        self.memory = DeviceMemory(shape.num_bytes, gpu.ordinal)
        self.num_bytes = int(self.pages.size) * shape.payload_bytes
        rows = groups(shape.segments, shape.layer_ends, gpu.max_pitch)
        self.device = DevicePages(self.memory.mapping, rows)


def bandwidth() -> None:
    """Every way of moving pages, against one plain copy of as many bytes in the same run."""
    gpu = Gpu(0)
    _, memory = arena(ARENA_BYTES)
    piece = min(PIECE, ARENA_BYTES)
    registered = Registered(memory, piece)
    registered.ensure(np.arange(0, ARENA_BYTES, piece, np.uint64), 1)
    peak = plain(gpu, registered.address, piece)
    say("a plain copy, GB/s", f"to the device {peak[0]:.1f}, from it {peak[1]:.1f}")
    print("  rows of    layers  layout          to device         from device   (GB/s, of plain)")
    layers = 48
    for size in (4096, 8192, 16384, 32768):
        pages = min(max(1, ARENA_BYTES // (2 * layers * size + HEADER_BYTES)), 1024)
        for name, lay in (("layer major", layer_major), ("side by side", side_by_side)):
            shape = lay(layers, pages, size)
            if piece < shape.payload_bytes + HEADER_BYTES:
                continue
            pool = Pool(gpu, shape, registered, ARENA_BYTES)
            if not pool.pages.size:
                continue
            mover = Mover(gpu, registered)
            ways = (
                lambda m=mover, p=pool: m.write(p.device, p.pages, p.payloads),
                lambda m=mover, p=pool: m.read(p.device, p.pages, p.payloads),
            )
            up, down = (pool.num_bytes / median_s(way) / GB for way in ways)
            row = size * (2 if name == "side by side" else 1)
            print(
                f"  {row:7}  {-(-layers // GROUPS_MAX):8}  {name:13}"
                f"{up:8.2f} {up / peak[0]:6.2f}   {down:8.2f} {down / peak[1]:6.2f}",
                flush=True,
            )
            mover.close()
            pool.memory.close()
    registered.close()


def plain(gpu: Gpu, host: int, num_bytes: int) -> tuple[float, float]:
    """GB/s of one copy, to the device and from it."""
    memory, stream = DeviceMemory(num_bytes, gpu.ordinal), gpu.stream()

    def there() -> None:
        ask(cu.cuMemcpyHtoDAsync, memory.address, host, num_bytes, stream)
        ask(cu.cuStreamSynchronize, stream)

    def back() -> None:
        ask(cu.cuMemcpyDtoHAsync, host, memory.address, num_bytes, stream)
        ask(cu.cuStreamSynchronize, stream)

    found = num_bytes / median_s(there) / GB, num_bytes / median_s(back) / GB
    ask(cu.cuStreamDestroy, stream)
    memory.close()
    return found


@contextmanager
def products() -> Iterator[Callable[[], float]]:
    """Another process that multiplies matrices: asked, it answers its milliseconds a product."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cuda.measure", "multiply", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        cwd=ROOT,
    )
    theirs.close()
    ours.settimeout(60)

    def ask_it() -> float:
        ours.send(b"?")
        return float(ours.recv(40))

    try:
        yield ask_it
    finally:
        process.kill()
        process.wait()
        ours.close()


def multiply(fd: int) -> None:
    """Where torch has no CUDA the products are naps: the step's way is checked, not its figures."""
    side = socket.socket(fileno=fd)
    try:
        import torch

        matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

        def product() -> None:
            torch.mm(matrix, matrix)
            torch.cuda.synchronize()

    except (ImportError, RuntimeError, AssertionError):

        def product() -> None:
            time.sleep(0.001)

    while side.recv(1):
        product()
        began = time.perf_counter()
        for _ in range(PRODUCTS):
            product()
        side.send(str((time.perf_counter() - began) / PRODUCTS * 1e3).encode())


def overlap() -> None:
    """How much copies of this process take from another's products, and the other way round."""
    gpu = Gpu(0)
    _, memory = arena(ARENA_BYTES)
    piece = min(PIECE, ARENA_BYTES)
    registered, size = Registered(memory, piece), 16384 if piece == PIECE else 4096
    shape = layer_major(48, max(1, ARENA_BYTES // (96 * size + HEADER_BYTES)), size)
    pool, mover = Pool(gpu, shape, registered, ARENA_BYTES), Mover(gpu, registered)

    def move() -> None:
        mover.write(pool.device, pool.pages, pool.payloads)

    quiet = pool.num_bytes / median_s(move) / GB
    with products() as milliseconds:
        say("products alone", f"{milliseconds():.2f} ms each")
        done, moved = threading.Event(), [0]

        def keep_moving() -> None:
            gpu.use()
            while not done.is_set():
                move()
                moved[0] += pool.num_bytes

        moving = threading.Thread(target=keep_moving)
        moving.start()
        began = time.perf_counter()
        during = milliseconds()
        took = time.perf_counter() - began
        done.set()
        moving.join()
    say("products beside copies", f"{during:.2f} ms each")
    say("copies, GB/s", f"{moved[0] / took / GB:.1f} beside products, {quiet:.1f} alone")


STEPS = {
    "facts": facts,
    "registration": registration,
    "sharing": sharing,
    "bandwidth": bandwidth,
    "overlap": overlap,
}


def main() -> None:
    if sys.argv[1] == "multiply":
        multiply(int(sys.argv[2]))
        return
    try:
        ask(cu.cuInit, 0)
    except (CudaFault, RuntimeError) as error:  # what the bindings raise without a driver
        print(f"no CUDA here: {error}")
        sys.exit(NOT_RUN)
    STEPS[sys.argv[1]]()


if __name__ == "__main__":
    main()

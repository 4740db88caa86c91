"""A file of experts, and one process that decodes over it: `experts_on_disk` starts it in a memory
cgroup. `python -m benchmarks.expert_file ours|mmap FILE PLACES` prints one line of JSON.

The file is layer after layer: gate and up of all its experts, then down of all: what a mapping can
compute on in place, and what the store reads by extents.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from benchmarks import report
from benchmarks.routings import Text
from engine.experts.hybrid import Weights
from engine.experts.reads import READERS
from engine.experts.store import ExpertStore, StoredExperts
from engine.extents import Extent
from engine.kernels import Choices, workbench_of

LAYERS, EXPERTS, CHOSEN, HIDDEN = 16, 64, 8, 1024
DTYPE = torch.bfloat16
WARM_TOKENS, TOKENS = 16, 24
THREADS = 2
SEED = 100
READ_EXPERTS = 48


def size_of(total_bytes: float) -> int:
    """The inner size of an expert, so that all of them have about so many bytes."""
    size = total_bytes / (LAYERS * EXPERTS * 3 * HIDDEN * DTYPE.itemsize)
    return max(32, int(size) // 32 * 32)


def write(path: Path, size: int) -> None:
    """The file, and beside it the digests of its tensors."""
    torch.manual_seed(0)
    part = size * HIDDEN * DTYPE.itemsize
    whole = (torch.randn(EXPERTS * 3 * size * HIDDEN) / 50).to(DTYPE).view(torch.uint8)
    digests: list[str] = []
    with path.open("wb") as file:
        for layer in range(LAYERS):
            data = whole.roll(2 * 977 * layer).numpy()
            digests += [
                xxhash.xxh3_128(data[begin : begin + part]).hexdigest()
                for begin in range(0, data.size, part)
            ]
            file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".json").write_text(json.dumps({"size": size, "digests": digests}))


def stored(path: Path, fd: int) -> dict[int, StoredExperts]:
    told = json.loads(path.with_suffix(".json").read_text())
    size, part = told["size"], told["size"] * HIDDEN * DTYPE.itemsize

    def extent(index: int) -> Extent:
        return Extent(str(index), fd, index * part, part, lambda: str(told["digests"][index]))

    layers = {}
    for layer in range(LAYERS):
        first = layer * 3 * EXPERTS
        experts = tuple(
            (
                extent(first + 2 * each),
                extent(first + 2 * each + 1),
                extent(first + 2 * EXPERTS + each),
            )
            for each in range(EXPERTS)
        )
        layers[layer] = StoredExperts(experts, size, HIDDEN, DTYPE)
    return layers


class Mapped:
    """The file mapped, and the kernel's page cache."""

    def __init__(self, path: Path, kernels: Choices) -> None:
        size = json.loads(path.with_suffix(".json").read_text())["size"]
        numbers = path.stat().st_size // DTYPE.itemsize
        data = torch.from_file(str(path), shared=True, size=numbers, dtype=DTYPE)
        self._layers = []
        for layer in data.view(LAYERS, -1):
            gate_up, down = layer.split(EXPERTS * size * HIDDEN * 2)
            self._layers.append(
                Weights(gate_up.view(EXPERTS, 2 * size, -1), down.view(EXPERTS, HIDDEN, -1))
            )
        self._kernels = kernels

    def compute(self, layer: int, x: Tensor, expert_ids: Tensor, outputs: Tensor) -> None:
        weights = self._layers[layer]
        self._kernels.compute(x, expert_ids, weights.gate_up, weights.down, outputs)


def decode(executor: Any) -> float:
    """Seconds for TOKENS tokens of one request, after some to warm up."""
    text = Text(SEED)
    document = text.document(0)
    steps = [text.choose(document, 1) for _ in range(WARM_TOKENS + TOKENS)]
    x, outputs = torch.randn(1, HIDDEN).to(DTYPE), torch.empty(1, CHOSEN, HIDDEN)
    began = 0.0
    for number, counts in enumerate(steps):
        if number == WARM_TOKENS:
            began = time.perf_counter()
        for layer in range(LAYERS):
            ids = torch.from_numpy(np.flatnonzero(counts[layer])).view(1, CHOSEN)
            executor.compute(layer, x, ids, outputs)
    return time.perf_counter() - began


def plain_reads(path: Path) -> float:
    """GB/s of O_DIRECT reads of 1 MiB at random places, as many at a time as the store's."""
    import mmap
    from concurrent.futures import ThreadPoolExecutor

    fd, block = os.open(path, os.O_RDONLY | os.O_DIRECT), 1 << 20
    places = np.random.default_rng(0).permutation(path.stat().st_size // block)[:768]

    def read(mine: list[int]) -> None:
        buffer = memoryview(mmap.mmap(-1, block))
        for place in mine:
            os.preadv(fd, [buffer], place * block)

    began = time.perf_counter()
    with ThreadPoolExecutor(READERS) as threads:
        list(threads.map(read, [places[lane::READERS].tolist() for lane in range(READERS)]))
    took = time.perf_counter() - began
    os.close(fd)
    return len(places) * block / took / 1e9


def fio_gb_s(path: Path) -> float | report.Absent:
    """GB/s of O_DIRECT reads of 1 MiB at random places, as many threads as the store's, by fio."""
    if shutil.which("fio") is None:
        return report.Absent("fio is not installed")
    command = ["fio", "--name=reads", f"--filename={path}", "--rw=randread", "--bs=1M"]
    command += ["--direct=1", "--ioengine=psync", f"--numjobs={READERS}", "--thread", "--readonly"]
    command += ["--group_reporting", "--time_based", "--runtime=3", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return report.Absent(done.stderr[-200:])
    text = done.stdout[done.stdout.index("{") :]
    return float(json.loads(text)["jobs"][0]["read"]["bw_bytes"]) / 1e9


def median_or_absent(samples: list[float | report.Absent]) -> float | report.Absent:
    numbers = [each for each in samples if not isinstance(each, report.Absent)]
    return float(np.median(numbers)) if numbers else samples[0]


def expert_reads(path: Path, at_once: int) -> float:
    """GB/s of the store's reads of whole experts at random, so many at a time, nothing computed."""
    fd = os.open(path, os.O_RDONLY)
    layers = stored(path, fd)
    store = ExpertStore(layers, at_once, Choices(workbench_of(1)))
    memory = layers[0].weights(at_once)
    for tensor in (memory.gate_up, memory.down):
        tensor.zero_()  # the first touch of memory is no read
    random = np.random.default_rng(0)
    reading: deque[Future[None]] = deque()
    began = time.perf_counter()
    for number in range(READ_EXPERTS):
        if len(reading) == at_once:
            reading.popleft().result()
        expert = int(random.integers(LAYERS)), int(random.integers(EXPERTS))
        reading.append(store.read(expert, memory, number % at_once))
    for each in reading:
        each.result()
    took = time.perf_counter() - began
    store.close()
    os.close(fd)
    return READ_EXPERTS * layers[0].expert_bytes / took / 1e9


def main() -> None:
    way, path, places = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    kernels = Choices(workbench_of(THREADS))
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    told: dict[str, float] = {}
    if way == "ours":
        store = ExpertStore(stored(path, fd), places, kernels)
        told["seconds"] = decode(store)
        told |= store.state()
        store.close()
    else:
        told["seconds"] = decode(Mapped(path, kernels))
    told["tokens_per_s"] = TOKENS / told["seconds"]
    print(json.dumps(told))


if __name__ == "__main__":
    main()

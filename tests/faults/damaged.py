"""Damages a stored directory again and again, and opens what is left in a forked process each time:
a library that dies of a damaged file takes that process, not the test.

`python -m tests.faults.damaged FOLDER SEED COUNT` prints a JSON line for each: what was done to
which file, how the process ended, and what the tier counted.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from kvc2.metrics import FAULTS
from tests.doubles.caches import faults, running
from tests.doubles.stand_in import StandIn, prompt

PROMPTS = 12
BLOCKS = 10
LIMIT_S = 60
SIZES = {"disk_bytes": 6 << 20, "cpu_bytes": 4 << 20, "slab_bytes": 1 << 18}


async def store(folder: Path) -> None:
    """Blocks of two layouts; some were evicted, so that pages were freed and used again."""
    async with running(folder, **SIZES) as cache:  # type: ignore[arg-type]
        engines = [StandIn(cache, 64), StandIn(cache, 64, segment_bytes=4096)]
        for seed in range(PROMPTS + 6):
            await engines[seed % 2].ask(prompt(seed, BLOCKS))
            await cache.flush(10)
            if seed == 6:
                await cache.evict("disk", 25)


async def use(folder: Path) -> dict[str, int]:
    """Start, ask for everything (each byte is judged), store more; the faults that were counted."""
    async with running(folder, **SIZES) as cache:  # type: ignore[arg-type]
        engines = [StandIn(cache, 64), StandIn(cache, 64, segment_bytes=4096)]
        for seed in range(PROMPTS):
            await engines[seed % 2].ask(prompt(seed, BLOCKS))
        await engines[0].ask(prompt(1000, BLOCKS))
        assert (await cache.flush(20)).not_durable_blocks == {}
        await cache.evict("disk", 5)
        cache.index.check()
        return {kind: count for kind in FAULTS if (count := faults(cache, kind))}


def flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 1, 8, 64])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def garbage(data: bytearray, chance: random.Random) -> None:
    start, size = chance.randrange(len(data)), chance.choice([1, 16, 512, 4096, 65536])
    data[start : start + size] = chance.randbytes(len(data[start : start + size]))


def zeros(data: bytearray, chance: random.Random) -> None:
    page = chance.randrange(0, len(data), 4096)
    size = chance.choice([512, 4096, 16384])
    data[page : page + size] = bytes(len(data[page : page + size]))


def one_page_over_another(data: bytearray, chance: random.Random) -> None:
    pages = max(1, len(data) // 4096)
    source, target = (4096 * chance.randrange(pages) for _ in range(2))
    data[target : target + 4096] = data[source : source + 4096]


def numbers_in_a_page(data: bytearray, chance: random.Random) -> None:
    """What a B-tree page begins with: its number, flags, bounds and offsets."""
    page = 4096 * chance.randrange(max(1, len(data) // 4096))
    for _ in range(chance.randrange(1, 4)):
        place = page + chance.randrange(0, 64)
        data[place] = chance.choice([0, 1, 255, chance.randrange(256)])


def truncated(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) // chance.choice([1, 4096]) :]


def longer(data: bytearray, chance: random.Random) -> None:
    data += chance.randbytes(chance.choice([1, 4096, 1 << 16]))


HARMS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bits,
    garbage,
    zeros,
    one_page_over_another,
    numbers_in_a_page,
    numbers_in_a_page,
    truncated,
    longer,
)


def harm(folder: Path, chance: random.Random) -> str:
    """Mostly the catalogue, whose first two pages are its superblocks; else a slab or recency."""
    kind = chance.choice(["data.mdb"] * 6 + ["superblock"] * 2 + ["slab", "recency"])
    found = {
        "slab": sorted(folder.glob("slabs/*/*.slab")),
        "recency": sorted(folder.glob("recency/*")),
    }.get(kind, [folder / "catalogue" / "data.mdb"])
    path, done = chance.choice(found), chance.choice(HARMS)
    data = bytearray(path.read_bytes())
    if kind == "superblock":
        head = data[:8192]
        done(head, chance)
        data[:8192] = head
    else:
        done(data, chance)
    path.write_bytes(data)
    return f"{kind}: {done.__name__}"


def attempt(folder: Path) -> dict[str, object]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        faulthandler.enable()
        signal.alarm(LIMIT_S)
        try:
            os.write(writing, json.dumps(asyncio.run(use(folder / "disk"))).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    said = os.read(reading, 1 << 16)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = (folder / "stderr").read_text(errors="replace")
    return {"status": status, "faults": json.loads(said or b"{}"), "stderr": text if status else ""}


def main() -> None:
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    pid = os.fork()  # threads end with the process: what is forked below has one
    if pid == 0:
        asyncio.run(store(folder / "sound"))
        os._exit(0)
    os.waitpid(pid, 0)
    for number in range(count):
        chance, live = random.Random(seed * 1_000_003 + number), folder / "live"
        shutil.rmtree(live, ignore_errors=True)
        shutil.copytree(folder / "sound", live / "disk")
        what = harm(live / "disk", chance)
        print(json.dumps({"number": number, "harm": what, **attempt(live)}), flush=True)


if __name__ == "__main__":
    main()

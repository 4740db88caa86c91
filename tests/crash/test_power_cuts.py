"""A power cut at any moment: what was acknowledged is there, nothing that is there is wrong, and
the tier starts."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.order import spoiled_blocks
from tests.crash.power import Medium, gone, journal, owed
from tests.crash.writer import SIZES, digests, engines, prompt_of
from tests.doubles.caches import faults, folder_in_memory, on_disk, running
from tests.doubles.stand_in import PAGE_SIZE

HERE = Path(__file__).parent
LOST = 0.3  # of the images lose their catalogue too: it is rebuilt
OTHERS = 4  # prompts that nobody was told to be durable: whatever comes of them is right


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("journal") / "journal.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, HERE / "journal.cpp", "-o", made, "-ldl"], check=True)
    return made


@pytest.fixture
def memory() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


def written(shim: Path, folder: Path, seed: int, steps: int) -> Medium:
    """Runs the writer under the journal, whose file is then folder/journal."""
    live = folder / "live"
    live.mkdir()
    under = Medium(live)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "KVC2_JOURNAL": str(folder / "journal"),
        "KVC2_JOURNAL_UNDER": str(live),
    }
    command = [sys.executable, "-m", "tests.crash.writer", live / "disk", str(seed), str(steps)]
    subprocess.run(command, env=environment, check=True)
    return under


async def judge(image: Path, medium: Medium, chance: random.Random) -> int:
    """Opens the image as a daemon would; how many blocks were owed. AssertionError: one is lost, or
    wrong bytes came."""
    due = owed(medium.notes)
    seen = {key for key, held in due.items() if held}
    rest = sorted(set(due) - seen)
    if lost := chance.random() < LOST:
        shutil.rmtree(image / "disk" / "catalogue", ignore_errors=True)
    async with running(image / "disk", **{**SIZES, "cpu_bytes": 16 << 20}) as cache:
        sessions, count = engines(cache), 0
        cache.index.check()
        assert not gone(medium.notes) & {each.hex() for each in on_disk(cache)}, "it was evicted"
        if lost and seen:
            assert faults(cache, "catalogue_reset") == 1
        for number, seed in sorted(seen):
            tokens, held = prompt_of(seed), due[number, seed]
            keys = digests(number, tokens)
            depth = next((n for n, key in enumerate(keys) if key not in held), len(keys))
            session = sessions[number]
            match = cache.leases.match(session.session, session.opened, tokens)
            assert match.matched_tokens >= depth * PAGE_SIZE, "what was acknowledged is lost"
            request, found = await session.acquire(tokens)
            await session.arrived(found.transfer)
            session.judge(tokens, found)
            assert found.matched_tokens >= depth * PAGE_SIZE, "what was acknowledged is spoiled"
            cache.leases.release(session.session, request)
            count += depth
        for number, seed in chance.sample(rest, min(OTHERS, len(rest))):
            await sessions[number].ask(prompt_of(seed))
        if chance.random() < 0.2:
            await cache.flush(10)
        cache.index.check()
    return count


def cuts(shim: Path, folder: Path, *, seed: int, steps: int, images: int) -> None:
    medium, chance = written(shim, folder, seed, steps), random.Random(seed)
    records = journal(folder / "journal")
    at = sorted(chance.randrange(len(records)) for _ in range(images))
    done, judged = 0, 0
    for image, record in enumerate(at):
        while done < record:
            medium.feed(records[done])
            done += 1
        place, drawn = folder / "image", random.Random(seed * 1_000_003 + image)
        medium.cut(place, drawn)
        try:
            assert spoiled_blocks(place / "disk") == {}
            judged += asyncio.run(judge(place, medium, drawn))
        except Exception as error:
            error.add_note(f"seed {seed}, image {image}, cut before record {record}")
            raise
        shutil.rmtree(place)
    print(f"{images} images of {len(records)} records, {judged} acknowledged blocks looked for")
    assert judged > 10 * images


def test_what_was_acknowledged_outlives_a_power_cut(shim: Path, memory: Path) -> None:
    cuts(shim, memory, seed=1, steps=300, images=60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2, 7))
def test_what_was_acknowledged_outlives_a_thousand_power_cuts(
    shim: Path, memory: Path, seed: int
) -> None:
    cuts(shim, memory, seed=seed, steps=600, images=200)

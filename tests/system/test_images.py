"""Two prompts with the same text and other images, by a real daemon: the text before the images is
shared, the images are not, and so it is after kill -9, from a catalogue and from a rebuilt one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from kvc2.answers import U8
from kvc2.client import Asked, LeaseCommit, Media, NamespaceHandle
from kvc2.tiers.disk.check import check
from tests.doubles.engines import LAYERS, NUM_PAGES, PAGE_SIZE, TinyEngine, identity
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess

TEXT, IMAGE, QUESTION = np.arange(40), np.full(50, 9), np.arange(20)
TOKENS = np.concatenate([TEXT, IMAGE, QUESTION]).astype(np.uint32)
BLOCKS, SHARED = 6, 2
NAMES = ("cat", "dog")


def prompt(name: str) -> Asked:
    return Asked(TOKENS, extras=[Media(len(TEXT), len(IMAGE), name.encode().ljust(32))])


def truth(name: str) -> U8:
    """[blocks] a byte that fills each: the same before the image alone."""
    return np.array([b if b < SHARED else b + 10 * ord(name[0]) for b in range(BLOCKS)]) % 251


def memory(engine: TinyEngine) -> U8:
    """[pages] by segment."""
    return np.frombuffer(engine.pool.map, np.uint8).reshape(2 * LAYERS, NUM_PAGES, -1)


def compute(engine: TinyEngine, handle: NamespaceHandle, name: str) -> int:
    """Tokens that were there; what was there is right, the rest is computed and durable."""
    client, what = engine.client, prompt(name)
    found = client.acquire(handle, name.encode(), what, grant_pages=BLOCKS)
    assert not found.transfer or client.wait_layer(found.transfer, LAYERS - 1, 10)
    first = found.matched_tokens // PAGE_SIZE
    for block, page in enumerate(found.prefix_pages):
        assert (memory(engine)[:, page] == truth(name)[block]).all(), (name, block)
    if first < BLOCKS:
        pages = found.granted_pages[: BLOCKS - first]
        memory(engine)[:, pages] = truth(name)[first:, None]
        rest = TOKENS[first * PAGE_SIZE : BLOCKS * PAGE_SIZE]
        commit = LeaseCommit(name.encode(), first, rest, pages, what.extras)
        answer = client.commit([commit], durable=True)
        assert (answer.results[0].tolist(), answer.durable) == ([0] * len(pages), True)
    client.release([name.encode()], returned=found.granted_pages[BLOCKS - first :])
    return found.matched_tokens


def test_images_are_told_apart_in_memory_and_on_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    flags = ("--disk-path", str(disk), "--disk-size-gb", "0.064")
    with DaemonProcess(tmp_path, *flags) as daemon, TinyEngine(daemon.address) as engine:
        handle = engine.client.open_namespace(identity().encode())
        assert [compute(engine, handle, name) for name in NAMES] == [0, SHARED * PAGE_SIZE]
        for rebuilt in (False, True):
            daemon.kill()
            assert engine.wait_detached(1 + rebuilt)
            report = check(disk)
            assert (report.sound, report.verified_blocks) == (True, 2 * BLOCKS - SHARED)
            if rebuilt:
                shutil.rmtree(disk / "catalogue")
            daemon.start()
            assert engine.client.wait_attached(10)
            tiers = engine.client.match(handle, prompt("cat")).tiers
            assert tiers.disk == BLOCKS * PAGE_SIZE
            for other in (Asked(TOKENS), prompt("bird")):
                assert engine.client.match(handle, other).matched_tokens == SHARED * PAGE_SIZE
            memory(engine)[:] = 255
            assert [compute(engine, handle, name) for name in NAMES] == 2 * [BLOCKS * PAGE_SIZE]
            with daemon.admin() as admin:
                admin.scrub(0)
                wait_until(lambda: not admin.scrub().running, 10)
                found = admin.scrub()
                assert (found.verified_blocks, found.bad_blocks) == (2 * BLOCKS - SHARED, 0)

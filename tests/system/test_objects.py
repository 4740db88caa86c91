"""Blocks under keys while the daemon is killed and frozen: what is told to be there was put, byte
by byte, nobody waits for long, and it goes on when there is a daemon again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvc2.client import Objects, open_objects
from kvc2.foreign_identity import Foreign
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess

BYTES = 20_000
IDENTITY = Foreign("test", "w", {"page_size": 1}).encode()
WAIT_S = 30.0
KEYS = 400  # 8 MB of an arena of 16


def value(number: int) -> NDArray[np.uint8]:
    """What lies under a key: no two alike, and no two of their bytes in the same place."""
    return np.random.default_rng(number).integers(0, 256, BYTES, np.uint8)


@dataclass
class Load:
    """Threads that put and get, each batch another, until told to stop."""

    objects: Objects
    stop: threading.Event = field(default_factory=threading.Event)
    put: int = 0
    got: int = 0

    def run(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        while not self.stop.is_set():
            numbers = random.choice(KEYS, 12, replace=False).tolist()
            keys = [b"%d" % each for each in numbers]
            if random.random() < 0.5:
                stored = self.objects.put_from(keys, [value(each) for each in numbers])
                self.put += int(stored.sum())
                continue
            into = np.zeros((12, BYTES), np.uint8)
            found = self.objects.get_into(keys, into)
            self.got += int(found.sum())
            for index in np.flatnonzero(found).tolist():
                assert (into[index] == value(numbers[index])).all(), f"wrong bytes: {keys[index]!r}"

    def goes_on(self) -> None:
        """Something is put and got from now on."""
        put, got = self.put, self.got
        wait_until(lambda: self.put > put and self.got > got, WAIT_S)


@pytest.mark.parametrize("what", ["kill", "freeze"])
def test_a_daemon_that_goes_in_the_midst_of_it_is_a_no_and_never_a_lie(
    what: str, tmp_path: Path
) -> None:
    with DaemonProcess(tmp_path, "--disk-path", str(tmp_path / "disk")) as daemon:
        objects = open_objects(daemon.address, IDENTITY, BYTES, staging_bytes=16 * BYTES)
        load = Load(objects)
        with ThreadPoolExecutor(4) as threads:
            running = [threads.submit(load.run, seed) for seed in range(4)]
            try:
                for _ in range(3):
                    load.goes_on()
                    if what == "kill":
                        daemon.kill()
                        wait_until(lambda: objects.client.state != "attached")
                        daemon.start()
                    else:
                        daemon.freeze()
                        wait_until(lambda: objects.client.state != "attached")
                        daemon.thaw()
                load.goes_on()
            finally:
                load.stop.set()
            for each in running:
                each.result(WAIT_S)
        assert sorted(objects._storing._staging._free + objects._storing._staging._unsure) == list(
            range(16)
        )
        objects.close()
        with daemon.admin() as admin:
            assert admin.stats().leases == 0


def test_calls_on_a_frozen_daemon_end_and_say_no(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        objects = open_objects(daemon.address, IDENTITY, BYTES, staging_bytes=16 * BYTES)
        assert objects.client.wait_attached(WAIT_S)
        keys, rows = [b"a", b"b"], [value(1), value(2)]
        assert objects.put_from(keys, list(rows)).all()
        daemon.freeze()
        with ThreadPoolExecutor(3) as threads:
            calls = [
                threads.submit(objects.exists, keys),
                threads.submit(objects.get_into, keys, np.zeros((2, BYTES), np.uint8)),
                threads.submit(objects.put_from, [b"c", b"d"], list(rows)),
            ]
            assert not any(each.result(WAIT_S).any() for each in calls)
        assert not objects.exists(keys).any()
        daemon.thaw()
        wait_until(lambda: bool(objects.exists(keys).all()))
        into = np.zeros((2, BYTES), np.uint8)
        assert objects.get_into(keys, into).all()
        np.testing.assert_array_equal(into, rows)
        objects.close()

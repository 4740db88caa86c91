"""Mooncake for tests: a stand-in for its package, in the processes that a daemon starts for it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvc2.host.store_url import MooncakeUrl
from kvc2.tiers.remote.mooncake import Mooncake
from kvc2.tiers.remote.store import StoreError
from tests import ROOT

PACKAGE = {"store.py": "mooncake_store.py", "mooncake_config.py": "mooncake_config.py"}


class StandInStore:
    """`folder` holds its values and its faults."""

    url = "mooncake://127.0.0.1:1"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fail(self, fault: str) -> None:
        """`dead`, `full`, `frozen` or `wedged`; empty: all is well."""
        if fault:
            fresh = self.folder / "fresh"
            fresh.write_text(fault)
            fresh.rename(self.folder / "fault")
        else:
            (self.folder / "fault").unlink(missing_ok=True)

    def names(self) -> list[bytes]:
        return sorted(bytes.fromhex(each.stem) for each in self.folder.glob("*.value"))

    def told(self) -> dict[str, Any]:
        """What its client was set up with last."""
        found: dict[str, Any] = json.loads((self.folder / "setup.json").read_text())
        return found


@contextmanager
def standing_in(folder: Path, **variables: str) -> Iterator[StandInStore]:
    """Whoever is started now and imports mooncake has the stand-in, and these variables."""
    folder.mkdir(exist_ok=True)
    packages = folder / "packages"
    (packages / "mooncake").mkdir(parents=True)
    for name, double in PACKAGE.items():
        shutil.copy(ROOT / "tests/doubles" / double, packages / "mooncake" / name)
    with pytest.MonkeyPatch.context() as patch:
        for name in [each for each in os.environ if each.startswith("MOONCAKE_")]:
            patch.delenv(name)
        patch.syspath_prepend(str(packages))  # the daemon asks whether it is there
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
        )
        patch.setenv("MOONCAKE_STANDIN", str(folder))
        for name, value in variables.items():
            patch.setenv(name, value)
        yield StandInStore(folder)


@asynccontextmanager
async def mooncake(url: str, deadline_s: float = 20.0) -> AsyncIterator[Mooncake]:
    """A store whose client has begun."""
    store = Mooncake(MooncakeUrl.parse(url, field="url"), deadline_s)
    try:
        await answering(store)
        yield store
    finally:
        await store.close()


async def answering(store: Mooncake) -> None:
    """When it is: each ping may begin a client."""

    async def answers() -> bool:
        try:
            await store.ping()
        except StoreError:
            return False
        return True

    while not await answers():
        await asyncio.sleep(0.05)

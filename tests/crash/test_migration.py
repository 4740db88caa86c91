"""kill -9 of a daemon while it takes a directory of an earlier format over: the directory is as it
was or as it should be, and the next start goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvc2.tiers.disk.catalogue import FORMAT_VERSION
from kvc2.tiers.disk.check import check
from tests.crash.failpoints import AT_START
from tests.crash.victims import Nursery
from tests.fixtures.directories import unpack
from tests.kvc2.tiers.test_earlier_directories import FORMATS, judge

MOMENTS = (*AT_START, "table_begun", "names_written", "slab_opened", "synced")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_it_may_die_at_any_moment_of_the_start(
    nursery: Nursery, tmp_path: Path, version: int, moment: str
) -> None:
    stored = unpack(version, tmp_path)
    before = check(stored.path)
    victim = nursery.start(tmp_path, moment)
    try:
        assert not victim.serves(), victim.tail()
        assert victim.dead()
    finally:
        victim.close()
    after = check(stored.path)
    committed = moment not in ("catalogue_beginning", "format_checked")
    assert after.format == (FORMAT_VERSION if committed else version)
    assert after.sound
    assert after.records == before.records
    assert asyncio.run(judge(stored, lasting=True)) == 29
    assert check(stored.path).format == FORMAT_VERSION

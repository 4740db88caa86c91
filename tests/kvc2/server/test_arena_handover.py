"""Who gets the arena to read, and when its readers are told that what they read counts no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvc2.errors import Denied
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.wires import Wire, hello


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    with ServedDaemon(serve_config(tmp_path), cache=None) as daemon:
        yield daemon


def test_the_arena_is_for_processes_of_the_daemons_own_user_alone(served: ServedDaemon) -> None:
    attachments = served.daemon.attachments
    with Wire(served.address) as wire:
        nonce = wire.attach(hello(arena=True)).nonce
        with pytest.raises(Denied, match=r"hello\.arena"):
            served.on_loop(lambda: attachments.expect(nonce, os.geteuid() + 1))
    with Wire(served.address) as wire:  # who doesn't ask for it may be another's
        nonce = wire.attach(hello()).nonce
        expected = served.on_loop(lambda: attachments.expect(nonce, os.geteuid() + 1))
        assert expected.arena_fd == -1


def test_readers_are_fenced_before_their_leases_end(
    served: ServedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on its pages may hold other blocks."""
    cache, fenced = served.daemon.cache, []
    close = cache.close_session

    async def closing(session: Any, *at_rest: Any) -> None:
        fenced.append(bytes(handover.progress[8:16]) != bytes(8))
        await close(session, *at_rest)

    monkeypatch.setattr(cache, "close_session", closing)
    with Wire(served.address) as wire:
        wire.open()
        handover = next(iter(served.daemon.attachments._open.values())).handover
        assert handover is not None
        assert bytes(handover.progress[8:16]) == bytes(8)
        served.on_loop(next(iter(served.daemon.attachments.table)).give_up)
        with pytest.raises(Exception, match="failed"):
            for _ in wire.stream:
                pass
    served.on_loop(lambda: None)
    assert fenced == [True]

"""Each table with a limit: what happens one past it, and that new work works again after it.

`LIMITS` is the list; a limit of the configuration that is not in it fails a test.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc2 import _core
from kvc2.cache.explain import RECENT_MAX
from kvc2.client import Admin, Client, LeaseCommit, NamespaceHandle
from kvc2.config import LimitsConfig, TenantConfig
from kvc2.errors import InvalidRequest, Kvc2Error, LimitReached, NotFound
from kvc2.server.callers import DURABLE_WAITS_MAX
from kvc2.server.side import PENDING_MAX
from kvc2.shares import SharedTable
from tests.doubles.caches import running
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engine_doubles import Clock
from tests.doubles.engines import NUM_PAGES, PAGE_SIZE, TinyEngine, identity, layout
from tests.doubles.stand_in import StandIn, prompt
from tests.doubles.wires import Wire, hello, memfd

TOKENS = np.arange(3 * PAGE_SIZE + 1, dtype=np.uint32)


@contextmanager
def attached(folder: Path, **limits: int) -> Iterator[tuple[ServedDaemon, Client]]:
    """A real daemon and one engine."""
    config = serve_config(folder, limits=LimitsConfig(**{"max_tokens": 1 << 12, **limits}))
    with ServedDaemon(config, cache=None) as served, TinyEngine(served.address) as engine:
        yield served, engine.client


def ask(client: Client, handle: NamespaceHandle, request_id: bytes = b"r") -> int:
    """A whole request; how many of its tokens were cached."""
    found = client.acquire(handle, request_id, TOKENS, grant_pages=3)
    full, held = len(TOKENS) // PAGE_SIZE, len(found.prefix_pages)
    new = TOKENS[held * PAGE_SIZE : full * PAGE_SIZE]
    pages, spare = np.split(found.granted_pages, [full - held])
    if len(new):
        client.commit([LeaseCommit(request_id, held, new, pages)])
    client.release([request_id], returned=spare)
    return found.matched_tokens


def salted(client: Client, salt: int, tenant: str = "") -> NamespaceHandle:
    return client.open_namespace(identity().encode(), tenant, b"%d" % salt)


def refused(call: Callable[[], Any], kind: type[Kvc2Error], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


# ---- the daemon's


def sessions(folder: Path) -> None:
    """Refused by name; the client tries on, and is attached once one ends."""
    config = serve_config(folder, limits=LimitsConfig(max_sessions=1))
    with ServedDaemon(config) as served, TinyEngine(served.address) as first:
        second = TinyEngine(served.address)
        with second.changed:
            assert second.changed.wait_for(lambda: second.failures, 10)
        assert "limits.max_sessions = 1" in str(second.failures[0])
        first.client.close()
        with second:
            assert second.client.state == "attached"


def namespaces(folder: Path) -> None:
    """The least recently used one without an open lease is let go of, and opened again by its
    client; what is cached under it is still there."""
    with attached(folder, max_namespaces=3) as (served, client):
        handles = [salted(client, salt) for salt in range(10)]
        assert [ask(client, each) for each in handles] == [0] * 10
        assert [ask(client, each) for each in handles] == [3 * PAGE_SIZE] * 10  # each anew
        session = next(iter(served.daemon.attachments.table))
        assert len(session.namespaces) == len(session.layouts) == 3
        for n, each in enumerate(handles[:3]):  # all three are in use
            client.acquire(each, b"open %d" % n, TOKENS)
        refused(lambda: ask(client, handles[5]), LimitReached, "limits.max_namespaces = 3")
        client.release([b"open 1"])
        assert ask(client, handles[5]) == 3 * PAGE_SIZE
        assert client.match(handles[0], TOKENS).matched_tokens == 3 * PAGE_SIZE
        client.release([b"open 0", b"open 2"])
        assert [ask(client, each) for each in handles] == [3 * PAGE_SIZE] * 10


def known_namespaces(folder: Path) -> None:
    """What no session has open goes: at once what has no block, else its blocks end and the next
    one finds room."""

    async def run(disk: Path | None, **more: Any) -> None:
        clock = Clock()
        limits = LimitsConfig(max_known_namespaces=6)
        async with running(disk, clock=clock, limits=limits, **more) as cache:
            engine = StandIn(cache, 64)
            held, words = engine.opened, set()

            async def salt(number: int) -> int:
                """Tokens that its second request matches; -1: it was refused."""
                name = hashlib.sha256(b"%d" % number).digest()
                try:
                    engine.opened = cache.open_namespace(engine.session, name, b"{}")
                except LimitReached as error:
                    words.add(str(error))
                    return -1
                await engine.ask(prompt(0, 2))
                if disk is not None:
                    assert (await cache.flush(10)).not_durable_blocks == {}
                return (await engine.ask(prompt(0, 2))).matched_tokens

            engine.session.namespaces.put("", held.id, held)
            await engine.ask(prompt(0, 2))
            worked = []
            for number in range(30):
                worked.append(await salt(number))
                clock.now += 1
                cache.tick()
                if cache._background is not None:
                    await cache._background.drained(10)  # what ended leaves all tiers
                cache.index.check()
            assert set(worked) == {-1, 8}
            assert words == {
                "limits.max_known_namespaces = 6: are known and in use; try again soon"
            }
            assert worked[:5] == [8] * 5
            assert worked.count(8) > 10  # and not for a while alone
            assert cache.index.counts().namespaces <= 6
            engine.opened = held  # it was open all the time
            assert (await engine.ask(prompt(0, 2))).matched_tokens == 8
            if disk is not None:
                assert len(cache._pools.tiers.disks[0].catalogue.namespaces) <= 6

    asyncio.run(run(None))
    asyncio.run(run(None, gpu_only=True))
    asyncio.run(run(folder / "disk"))
    asyncio.run(run(folder / "disk"))  # what the disk has from before goes as well


def leases(folder: Path) -> None:
    """Refused by name until one is released."""
    with attached(folder, max_leases=2) as (_, client):
        handle = salted(client, 0)
        for name in (b"1", b"2", b"2"):
            client.acquire(handle, name, TOKENS)
        refused(lambda: ask(client, handle, b"3"), LimitReached, "limits.max_leases = 2")
        client.release([b"1"])
        assert ask(client, handle, b"3") == 0


def leases_per_call(folder: Path) -> None:
    """Such a call changes nothing."""
    with attached(folder, max_leases_per_call=2) as (_, client):
        refused(lambda: client.release([b"1", b"2", b"3"]), InvalidRequest, "request_ids")
        client.release([b"1", b"2"])


def tokens(folder: Path) -> None:
    """Such a call changes nothing."""
    with attached(folder, max_tokens=64) as (_, client):
        handle, long = salted(client, 0), np.zeros(65, np.uint32)
        refused(lambda: client.acquire(handle, b"1", long), InvalidRequest, "at most 64")
        assert ask(client, handle) == 0


def grant_pages(folder: Path) -> None:
    """Such a call changes nothing."""
    with attached(folder, max_grant_pages=3) as (_, client):
        refused(lambda: client.grant(4), InvalidRequest, "at most 3")
        assert len(client.grant(3)) == 3


def pool_pages(folder: Path) -> None:
    """Refused by name; a smaller one attaches."""
    for most, word in ((NUM_PAGES - 1, "hello.pools[0].num_pages"), (NUM_PAGES, "")):
        config = serve_config(folder, limits=LimitsConfig(max_pool_pages=most))
        with ServedDaemon(config) as served:
            engine = TinyEngine(served.address)
            with engine.changed:
                assert engine.changed.wait_for(lambda e=engine: e.failures or e.granted, 10)
            assert [word in str(each) for each in engine.failures[:1]] == [True] * bool(word)
            engine.client.close()


def keys(folder: Path) -> None:
    """Such a call changes nothing; what is asked in two calls is answered."""
    with attached(folder, max_keys=2) as (_, client):
        handle = client.open_handle(NamespaceHandle(identity().encode(), opaque=True))
        refused(lambda: client.match_keys(handle, [b"1", b"2", b"3"]), InvalidRequest, "at most 2")
        assert client.match_keys(handle, [b"1", b"2"]).tolist() == [0, 0]


def dead_blocks(folder: Path) -> None:
    """The oldest death is forgotten: its prompt was never seen then."""
    index = _core.Index(first_generation=1, dead_blocks=4)
    pool = index.add_pool(page_size=1, pages_per_slab=8, below=None, durable=False, tier=0)
    index.add_slab(pool)
    space = index.open_namespace(bytes(32), 1)
    for token in range(6):
        lease = index.acquire(space, pool, np.array([token], np.uint32), 1)
        pages = index.grant(pool, 1)
        index.commit(lease.id, 0, np.array([token], np.uint32), pages)
        index.release(lease.id)
        index.evict(pool, 8)

    def why(token: int) -> str:
        found = index.explain(space, [pool], np.array([token], np.uint32))
        return found.why.name if found.death is None else found.death.cause.name

    assert [why(token) for token in range(6)] == ["NEVER_SEEN"] * 2 + ["EVICTED"] * 4
    assert (index.counts().dead_known, index.counts().deaths) == (4, 6)


def hard_pins(folder: Path) -> None:
    """Refused by name until one ends."""
    with attached(folder, hard_pin_percent=5) as (_, client):  # of 64 pages
        handle = salted(client, 0)
        other = TOKENS + 100
        assert client.pin(handle, TOKENS, tier="gpu", hard=True).blocks == 3
        refused(
            lambda: client.pin(handle, other, tier="gpu", hard=True),
            LimitReached,
            "limits.hard_pin_percent",
        )
        assert client.unpin(handle, TOKENS, tier="gpu") == 3
        assert client.pin(handle, other, tier="gpu", hard=True).blocks == 3


def soft_pins(folder: Path) -> None:
    """A tenant's are refused by name until one of its own ends; another tenant's fit."""
    secrets = {name: folder / name for name in ("good", "greedy")}
    for name, path in secrets.items():
        path.write_bytes(name.encode() * 16)
        path.chmod(0o600)
    config = serve_config(
        folder,
        limits=LimitsConfig(soft_pin_percent=10, max_tokens=1 << 12),  # of 64 pages
        tenants=tuple(TenantConfig(name, path) for name, path in secrets.items()),
    )
    with ServedDaemon(config, cache=None) as served, TinyEngine(served.address) as engine:
        pin = partial(engine.client.pin, tier="gpu", hard=False)
        greedy = [salted(engine.client, salt, "greedy") for salt in range(3)]
        assert [pin(each, TOKENS).pinned_blocks for each in greedy[:2]] == [3, 6]
        words = "soft_pin_percent = 10.*6 blocks.*'greedy'"
        refused(lambda: pin(greedy[2], TOKENS), LimitReached, words)
        good = [salted(engine.client, salt, "good") for salt in range(2)]
        assert [pin(each, TOKENS).pinned_blocks for each in good] == [9, 12]
        refused(lambda: pin(greedy[2], TOKENS), LimitReached, words)
        assert engine.client.unpin(greedy[0], TOKENS, tier="gpu") == 3
        assert pin(greedy[2], TOKENS).pinned_blocks == 12


def requests_told_of(folder: Path) -> None:
    """The oldest is forgotten, by name."""
    with attached(folder) as (_, client):
        handle = salted(client, 0)
        for number in range(RECENT_MAX + 1):
            client.acquire(handle, b"%d" % number, TOKENS)
            client.release([b"%d" % number])
        refused(lambda: client.explain_request(b"0"), NotFound, f"one of the last {RECENT_MAX}")
        assert client.explain_request(b"1").tokens == len(TOKENS)
        assert client.explain_request(b"%d" % RECENT_MAX).tokens == len(TOKENS)


def durable_waits(folder: Path) -> None:
    """Refused by name until one is over."""
    with attached(folder) as (served, _), Admin(served.address) as admin:
        counted, waits = served.daemon.calls.shared._waits, ExitStack()

        def wait() -> None:
            for _ in range(DURABLE_WAITS_MAX):
                waits.enter_context(counted.one())

        served.on_loop(wait)
        refused(lambda: admin.flush(1.0), LimitReached, f"durable waits = {DURABLE_WAITS_MAX}")
        served.on_loop(waits.close)
        assert admin.flush(1.0).durable_blocks == 0


def side_sockets(folder: Path) -> None:
    """One more is closed unheard; an engine attaches when they are gone."""
    with ServedDaemon(serve_config(folder)) as served, ExitStack() as stack:
        silent = []
        for _ in range(PENDING_MAX + 1):
            side = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(side).settimeout(10)
            side.connect(f"{served.address.removeprefix('unix:')}.side")
            silent.append(side)
        assert silent[-1].recv(1) == b""
        stack.close()
        with TinyEngine(served.address) as engine:
            assert engine.client.state == "attached"


# Two do not recover: a layout and an invalidated name are remembered as long as the daemon (its
# layouts), or its disk.path. What is known goes on, and one more is refused by name.
FOR_GOOD = {"limits.max_layouts", "catalogue.ERAS_MAX"}

# limit -> what shows it: a scenario of this file, or a test of another
LIMITS: dict[str, Callable[[Path], None] | str] = {
    "limits.max_sessions": sessions,
    "limits.max_namespaces": namespaces,
    "limits.max_known_namespaces": known_namespaces,
    "limits.max_dead_blocks": dead_blocks,
    "limits.max_leases": leases,
    "limits.max_leases_per_call": leases_per_call,
    "limits.max_tokens": tokens,
    "limits.max_pool_pages": pool_pages,
    "limits.max_grant_pages": grant_pages,
    "limits.max_keys": keys,
    "limits.max_streams": "kvc2.server.test_streams.test_one_stream_too_many_is_refused_by_name",
    "limits.max_calls_per_s": "kvc2.server.test_rates.test_one_tenant_s_flood_is_its_own",
    "limits.max_mb_per_s": "kvc2.server.test_rates.test_bytes_are_those_of_payloads",
    "limits.hard_pin_percent": hard_pins,
    "limits.soft_pin_percent": soft_pins,
    "explain.RECENT_MAX": requests_told_of,
    "callers.DURABLE_WAITS_MAX": durable_waits,
    "side.PENDING_MAX": side_sockets,
    "prefetch.AT_ONCE_MAX": "kvc2.cache.test_prefetch.test_only_so_many_at_once",
    "namespaces.NAMESPACES_MAX": "engine.test_scheduler.test_salts_end_nobodys_caching",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_one_past_a_limit_new_work_works_again(limit: str, tmp_path: Path) -> None:
    shown = LIMITS[limit]
    if isinstance(shown, str):
        module, _, name = shown.rpartition(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), name))
    else:
        shown(tmp_path)


def test_every_limit_of_the_configuration_is_listed() -> None:
    assert {f"limits.{each.name}" for each in fields(LimitsConfig)} <= set(LIMITS) | FOR_GOOD


def test_one_layout_too_many_is_refused_by_name_and_others_go_on(tmp_path: Path) -> None:
    with attached(tmp_path, max_layouts=1) as (served, client):
        with Wire(served.address) as wire:
            opened = wire.attach(hello(layout=layout(8).to_proto()))
            answer = wire.side(opened, opened.nonce, [memfd()])
            assert b"limits.max_layouts = 1" in answer
        assert [ask(client, salted(client, 0)) for _ in range(2)] == [0, 3 * PAGE_SIZE]
    with attached(tmp_path, max_layouts=1) as (_, client):  # what is known is never refused
        assert ask(client, salted(client, 0)) == 0


def test_too_many_invalidations_are_refused_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvc2.cache.namespaces.ERAS_MAX", 2)

    async def run() -> None:
        async with running(tmp_path / "disk") as cache:
            engine = StandIn(cache, 64)
            names = [hashlib.sha256(b"%d" % number).digest() for number in range(3)]
            opened = [cache.open_namespace(engine.session, each, b"{}") for each in names]

            async def matched() -> list[int]:
                found = []
                for engine.opened in opened:
                    found.append((await engine.ask(prompt(0, 2))).matched_tokens)
                return found

            assert [await matched(), await matched()] == [[0, 0, 0], [8, 8, 8]]
            with pytest.raises(LimitReached, match="invalidated namespaces = 2"):
                await cache.invalidate(names)
            assert await matched() == [8, 8, 8]  # none of them
            assert (await cache.invalidate(names[:2])).blocks == 4
            assert await matched() == [0, 0, 8]
            assert (await cache.invalidate(names[:2])).blocks == 4  # what is remembered, again

    asyncio.run(run())


def test_one_tenants_salts_end_no_other_tenants_namespaces(tmp_path: Path) -> None:
    secrets = {name: tmp_path / name for name in ("good", "greedy")}
    for name, path in secrets.items():
        path.write_bytes(name.encode() * 16)
        path.chmod(0o600)
    tenants = tuple(TenantConfig(name, path) for name, path in secrets.items())
    limits = LimitsConfig(max_namespaces=8, max_tokens=1 << 12)
    config = serve_config(tmp_path, limits=limits, tenants=tenants)
    with ServedDaemon(config, cache=None) as served, TinyEngine(served.address) as engine:
        client = engine.client
        good = [salted(client, salt, "good") for salt in range(3)]
        assert [ask(client, each) for each in good] == [0] * 3
        known = [each.opened for each in good]
        for salt in range(15):
            assert ask(client, salted(client, salt, "greedy")) == 0
        session = next(iter(served.daemon.attachments.table))
        assert len(session.namespaces) == 8
        assert [ask(client, each) for each in good] == [3 * PAGE_SIZE] * 3
        assert [each.opened for each in good] == known  # none was let go of


def test_who_has_most_gives_first() -> None:
    table: SharedTable[str, int, str] = SharedTable()
    for owner, key in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5), ("c", 6)]:
        table.put(owner, key, owner)
    assert table.use(1) == "a"
    assert list(table.victims("a")) == [2, 3, 1]
    assert list(table.victims("b")) == [2, 3, 1, 4, 5]
    assert list(table.victims("d")) == [2, 3, 1, 4, 5, 6]
    table.put("c", 1, "c")  # another owner's now
    assert (list(table.victims("c")), table.get(1)) == ([6, 1], "c")
    table.drop(6)
    table.drop(6)
    assert (len(table), 6 in table, table.use(6)) == (5, False, None)
    assert sorted(table) == [1, 2, 3, 4, 5]

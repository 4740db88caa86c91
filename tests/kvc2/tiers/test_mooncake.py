"""Mooncake behind the seam, by a stand-in for its package: its configuration as its users have it,
and whatever its client does, a call ends in time and the daemon's end too."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from kvc2.host.store_url import MooncakeUrl
from kvc2.metrics import Metrics, RemoteMetrics
from kvc2.tiers.remote import mooncake as mooncake_module
from kvc2.tiers.remote.link import Link
from kvc2.tiers.remote.mooncake import Mooncake, Room
from kvc2.tiers.remote.store import StoreError, StoreRefused, StoreUnable
from tests.doubles.mooncakes import answering, mooncake, standing_in
from tests.doubles.waiting import on_a_loop, until

SHORT_S = 0.3  # a deadline that is to be missed
CONFIG = {
    "local_hostname": "node1",
    "metadata_server": "http://meta:8080/metadata",
    "global_segment_size": "2gb",
    "local_buffer_size": 134217728,
    "protocol": "tcp",
    "device_name": "",
    "master_server_address": "master:50051",
    "tenant_id": "ours",
}


def pid_of(store: Mooncake) -> int:
    assert store._child is not None
    return store._child.pid


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# ---- its configuration ----


@on_a_loop
async def test_a_master_is_enough_and_we_lend_no_memory(tmp_path: Path) -> None:
    with standing_in(tmp_path / "s", MOONCAKE_PROTOCOL="rdma", MOONCAKE_DEVICE="mlx5_0") as store:
        async with mooncake("mooncake://10.0.0.7:50052"):
            told = store.told()
            assert told["master_server_addr"] == "10.0.0.7:50052"
            assert told["metadata_server"] == "P2PHANDSHAKE"
            assert told["global_segment_size"] == 0
            assert (told["protocol"], told["rdma_devices"]) == ("rdma", "mlx5_0")


@pytest.mark.parametrize("by", ["file", "variable"])
@on_a_loop
async def test_its_own_file_is_taken_as_it_is(tmp_path: Path, by: str) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text(json.dumps(CONFIG))
    variables = {"MOONCAKE_CONFIG_PATH": str(file)} if by == "variable" else {}
    url = "mooncake+env:" if by == "variable" else f"mooncake+file://{file}"
    with standing_in(tmp_path / "s", **variables) as store:
        async with mooncake(url):
            told = store.told()
            assert told["master_server_addr"] == "master:50051"
            assert told["metadata_server"] == "http://meta:8080/metadata"
            assert told["global_segment_size"] == 2 << 30
            assert told["local_buffer_size"] == 134217728
            assert told["tenant_id"] == "ours"


@on_a_loop
async def test_its_variables_are_taken_as_they_are(tmp_path: Path) -> None:
    variables = {"MOONCAKE_MASTER": "m:1", "MOONCAKE_GLOBAL_SEGMENT_SIZE": "4mb"}
    with standing_in(tmp_path / "s", **variables) as store:
        async with mooncake("mooncake+env:"):
            assert store.told()["master_server_addr"] == "m:1"
            assert store.told()["global_segment_size"] == 4 << 20


@on_a_loop
async def test_what_its_configuration_lacks_is_told(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text(json.dumps({**CONFIG, "master_server_address": ""}))
    with standing_in(tmp_path / "s"):
        store = Mooncake(MooncakeUrl(file=file), 20.0)
        await refused(store, "Missing required config field: master_server_address")
        await store.close()


async def refused(store: Mooncake, why: str) -> None:
    """Until a call says so."""
    said = ""
    while why not in said:
        with pytest.raises(StoreError) as caught:
            await store.ping()
        said = str(caught.value)
        await asyncio.sleep(0.02)


# ---- its faults ----


@on_a_loop
async def test_a_dead_master_is_seen_though_its_health_check_is_well(tmp_path: Path) -> None:
    with standing_in(tmp_path / "s") as stand_in:
        async with mooncake(stand_in.url) as store:
            await store.put([(b"a", b"one")], 0)
            stand_in.fail("dead")
            for call in (
                store.ping(),
                store.exists([b"a"]),
                store.get([b"a"], 10),
                store.put([(b"b", b"x")], 0),
                store.delete([b"a"]),
            ):
                with pytest.raises(StoreError, match="-900"):
                    await call
            stand_in.fail("")
            await store.ping()
            assert await store.get([b"a"], 10) == [b"one"]


@on_a_loop
async def test_one_that_is_full_refuses_and_is_read_on(tmp_path: Path) -> None:
    with standing_in(tmp_path / "s") as stand_in:
        async with mooncake(stand_in.url) as store:
            await store.put([(b"a", b"one")], 0)
            stand_in.fail("full")
            with pytest.raises(StoreRefused, match="-200"):
                await store.put([(b"b", b"x")], 0)
            await store.ping()
            assert await store.get([b"a"], 10) == [b"one"]


@pytest.mark.parametrize("fault", ["frozen", "wedged"])
@on_a_loop
async def test_a_call_that_does_not_end_is_ended_with_its_process(
    tmp_path: Path, fault: str
) -> None:
    with standing_in(tmp_path / "s") as stand_in:
        async with mooncake(stand_in.url, SHORT_S) as store:
            stuck = pid_of(store)
            stand_in.fail(fault)
            with pytest.raises(StoreError, match=r"no answer within 0\.3 s: its client is killed"):
                await store.get([b"a"], 10)
            await until(lambda: not is_there(stuck))
            stand_in.fail("")
            await answering(store)
            assert pid_of(store) != stuck
            await store.put([(b"a", b"one")], 0)


@on_a_loop
async def test_who_goes_away_ends_it_too_when_it_is_late(tmp_path: Path) -> None:
    """And the memory that the call was lent is nobody else's until then."""
    with standing_in(tmp_path / "s") as stand_in:
        async with mooncake(stand_in.url, SHORT_S) as store:
            child = store._child
            assert child is not None
            stand_in.fail("frozen")
            asking = asyncio.create_task(store.get([b"a"], 10))
            await until(lambda: len(child._calls) == 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert child.room._taken
            await until(lambda: child.over)
            assert not child.room._taken


@on_a_loop
async def test_a_process_that_dies_is_a_miss_and_the_next_call_begins_another(
    tmp_path: Path,
) -> None:
    with standing_in(tmp_path / "s") as stand_in:
        async with mooncake(stand_in.url) as store:
            await store.put([(b"a", b"one")], 0)
            stand_in.fail("frozen")
            asking = asyncio.create_task(store.get([b"a"], 10))
            await asyncio.sleep(0.05)
            os.kill(pid_of(store), signal.SIGKILL)
            with pytest.raises(StoreError, match="its client has ended"):
                await asking
            stand_in.fail("")
            await answering(store)
            assert await store.get([b"a"], 10) == [b"one"]


@pytest.mark.parametrize("fault", ["", "wedged"])
@on_a_loop
async def test_nothing_is_left_of_it_at_the_links_end(tmp_path: Path, fault: str) -> None:
    made: list[Mooncake] = []

    def make() -> Mooncake:
        made.append(Mooncake(MooncakeUrl("m:1"), 20.0))
        return made[0]

    with standing_in(tmp_path / "s") as stand_in:
        link = Link(make, RemoteMetrics(Metrics()), deadline_s=20.0, patience_s=5.0)
        await until(lambda: link.up)
        pid = pid_of(made[0])
        stand_in.fail(fault)
        asking = asyncio.create_task(link.exists([b"a"]))
        await asyncio.sleep(0.05)
        await link.close()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: not is_there(pid))


@on_a_loop
async def test_what_has_a_time_to_live_is_not_put(tmp_path: Path) -> None:
    with standing_in(tmp_path / "s") as stand_in:
        async with mooncake(stand_in.url) as store:
            with pytest.raises(StoreUnable, match="time to live"):
                await store.put([(b"a", b"x")], 50)
            assert not stand_in.names()


@on_a_loop
async def test_more_than_its_memory_goes_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_module, "MEMORY_BYTES", 4096 + 3000)
    values = [(b"%d" % each, bytes([each]) * 1000) for each in range(10)]
    names = [name for name, _ in values]
    with standing_in(tmp_path / "s") as stand_in:
        async with mooncake(stand_in.url) as store:
            await store.put(values, 0)
            found = await asyncio.gather(*(store.get(names, 1000) for _ in range(5)))
            assert all(each == [value for _, value in values] for each in found)
            with pytest.raises(StoreUnable, match="at most"):
                await store.put([(b"large", bytes(4000))], 0)
            await store.ping()


@on_a_loop
async def test_room_is_given_once_and_waited_for() -> None:
    room = Room(100)
    first, second = await room.take(60), await room.take(40)
    assert {first, second} == {0, 60}
    third = asyncio.create_task(room.take(50))
    await asyncio.sleep(0)
    assert not third.done()
    room.free(second)
    await asyncio.sleep(0)
    assert not third.done()
    room.free(first)
    assert await third == 0

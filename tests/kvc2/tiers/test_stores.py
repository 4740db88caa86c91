"""What every remote store must do, over each kind of it; and what is Valkey's: passwords, TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from kvc2.cache.remote import store_of
from kvc2.config import RemoteConfig
from kvc2.errors import StartRefused
from kvc2.host.store_url import S3Url, StoreUrl
from kvc2.tiers.remote.s3 import S3
from kvc2.tiers.remote.store import Store, StoreError, StoreRefused
from kvc2.tiers.remote.valkey import GROUP, Valkey
from tests import ROOT
from tests.doubles.buckets import NAME as BUCKET
from tests.doubles.buckets import bucket
from tests.doubles.mooncakes import mooncake, standing_in
from tests.doubles.stores import ServerProcess, ToldStore
from tests.doubles.waiting import on_a_loop

CERTIFICATES = ROOT / "tests/fixtures"
DEADLINE_S = 20.0
KINDS = ("told", "valkey", "mooncake", "s3")


@asynccontextmanager
async def opened(kind: str, folder: Path) -> AsyncIterator[Store]:
    if kind == "told":
        yield ToldStore()
        return
    if kind == "mooncake":
        with standing_in(folder / "standin") as stand_in:
            async with mooncake(stand_in.url) as store:
                yield store
        return
    if kind == "s3":
        with bucket():
            yield S3(S3Url(BUCKET, "a prefix"), None, DEADLINE_S)
        return
    with ServerProcess(folder) as server:
        async with connected(server.url) as store:
            yield store


@asynccontextmanager
async def connected(url: str, ca_file: Path | None = None) -> AsyncIterator[Valkey]:
    store = Valkey(StoreUrl.parse(url, field="url"), ca_file, DEADLINE_S)
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize("kind", KINDS)
@on_a_loop
async def test_what_was_put_is_there(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as store:
        large = bytes(range(256)) * (1 << 13)  # 2 MiB
        await store.ping()
        await store.put([(b"a", b"one"), (b"b", memoryview(large))], 0)
        assert await store.get([b"a", b"x", b"b"], len(large)) == [b"one", None, large]
        await store.put([(b"a", b"another")], 0)
        assert await store.get([b"a"], 100) == [b"another"]
        await store.delete([b"a", b"x"])
        assert await store.get([b"a", b"b"], len(large)) == [None, large]


@pytest.mark.parametrize("kind", KINDS)
@on_a_loop
async def test_what_is_too_long_is_cut_behind_one_byte_more(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as store:
        await store.put([(b"a", b"123456789")], 0)
        assert await store.get([b"a"], 4) == [b"12345"]
        assert await store.get([b"a"], 9) == [b"123456789"]


@pytest.mark.parametrize("kind", KINDS)
@on_a_loop
async def test_each_name_is_told_apart(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as store:
        names = [b"%d" % number for number in range(3 * GROUP + 5)]
        for missing in ([], [7], [GROUP], [0, 2 * GROUP, 3 * GROUP + 4], range(GROUP, 2 * GROUP)):
            gone = set(missing)
            await store.delete(names)
            there = [(name, b"v") for i, name in enumerate(names) if i not in gone]
            await store.put(there, 0)
            assert await store.exists(names) == [i not in gone for i in range(len(names))]


@on_a_loop
async def test_a_time_to_live_is_kept(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        async with connected(server.url) as store:
            await store.put([(b"a", b"x")], 50)
            await store.put([(b"b", b"x")], 0)
            assert 0 < int(server.call(b"TTL", b"a")) <= 50
            assert int(server.call(b"TTL", b"b")) == -1


@on_a_loop
async def test_what_is_no_value_is_not_there(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        async with connected(server.url) as store:
            server.call(b"LPUSH", b"list", b"x")
            await store.put([(b"a", b"x")], 0)
            assert await store.get([b"list", b"a"], 10) == [None, b"x"]
            assert await store.get([b"list"], 10) == [None]


async def fill(store: Store) -> None:
    """With 64 MiB."""
    for number in range(64):
        await store.put([(b"%d" % number, bytes(1 << 20))], 0)


@on_a_loop
async def test_a_store_that_is_full_refuses_and_is_read_on(tmp_path: Path) -> None:
    limits = ("--maxmemory", "24mb", "--maxmemory-policy", "noeviction")
    with ServerProcess(tmp_path, *limits) as server:
        async with connected(server.url) as store:
            with pytest.raises(StoreRefused, match="maxmemory"):
                await fill(store)
            assert await store.get([b"0"], 1 << 20) == [bytes(1 << 20)]


@on_a_loop
async def test_whatever_a_store_answers_is_an_error_at_worst(tmp_path: Path) -> None:
    """Not RESP, half an answer, a connection that ends, and one that does not begin."""
    answers = [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"$5\r\nab",
        b"*99999999\r\n",
        b"",
        b"$-7\r\n",
        b"\xff\r\n",
    ]
    for answer in answers:
        with talking(answer) as port:
            async with connected(f"redis://127.0.0.1:{port}") as store:
                with pytest.raises(StoreError):
                    await store.get([b"a"], 10)
    async with connected("redis://127.0.0.1:1") as store:
        with pytest.raises(StoreError):
            await store.ping()


@contextmanager
def talking(answer: bytes) -> Iterator[int]:
    """A port at which everybody hears this, and then nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    wire, _ = listening.accept()
                except OSError:
                    return
                with wire:
                    wire.recv(1 << 16)
                    wire.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@on_a_loop
async def test_passwords_and_databases_come_from_the_url(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--requirepass", "p@ss/word") as server:
        path = server.socket
        async with connected(f"unix://:p%40ss%2Fword@{path}") as store:
            await store.ping()
        async with connected(f"unix://:wrong@{path}") as store:
            with pytest.raises(StoreError, match=r"WRONGPASS|invalid"):
                await store.ping()
        async with connected(f"unix://{path}") as store:
            with pytest.raises(StoreError, match=r"NOAUTH|Authentication"):
                await store.ping()


def test_without_the_package_the_start_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kvc2.tiers.remote.valkey")
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    config = RemoteConfig("redis://store", Path("/secret"))
    with pytest.raises(StartRefused, match=r"remote\.url: redis.* pip install 'kvc2\[remote\]'"):
        store_of(config)
    monkeypatch.delitem(sys.modules, "kvc2.tiers.remote.s3", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StartRefused, match=r"remote\.url: obstore.*'kvc2\[s3\]'"):
        store_of(RemoteConfig("s3://store", Path("/secret")))
    monkeypatch.setattr("kvc2.cache.remote.find_spec", lambda name: None)
    config = RemoteConfig("mooncake://store", Path("/secret"))
    with pytest.raises(StartRefused, match=r"remote\.url: mooncake.*'kvc2\[mooncake\]'"):
        store_of(config)


@contextmanager
def behind_tls(server: ServerProcess) -> Iterator[int]:
    """A port of 127.0.0.1 at which a server is spoken to by TLS, as `localhost`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATES / "tls_server.pem", CERTIFICATES / "tls_server.key")
    loop = asyncio.new_event_loop()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_unix_connection(server.socket)
        await asyncio.gather(pipe(reader, inner[1]), pipe(inner[0], writer), return_exceptions=True)

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(listen(), loop).result(20)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(listening.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@on_a_loop
async def test_tls_is_spoken_with_whom_the_ca_has_signed_and_nobody_else(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--requirepass", "secret") as server, behind_tls(server) as port:
        ca_file = CERTIFICATES / "tls_ca.pem"
        async with connected(f"rediss://:secret@localhost:{port}", ca_file) as store:
            await store.put([(b"a", b"x" * 100_000)], 0)
            assert await store.get([b"a"], 100_000) == [b"x" * 100_000]
        for url, trusted in (
            (f"rediss://:secret@localhost:{port}", None),  # the system doesn't trust our CA
            (f"rediss://:secret@127.0.0.1:{port}", ca_file),  # another name than the certificate's
            (f"redis://:secret@localhost:{port}", None),  # no TLS
        ):
            async with connected(url, trusted) as store:
                with pytest.raises(StoreError):
                    async with asyncio.timeout(DEADLINE_S):
                        await store.ping()

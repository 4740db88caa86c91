"""S3 as the remote tier, as moto's server plays it, which reads its rules by itself."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.processes import Process, free_port
from kvc2.host.store_url import S3Url
from kvc2.tiers.remote.s3 import S3
from kvc2.tiers.remote.store import StoreError
from tests.doubles.engines import PAGE_SIZE
from tests.doubles.stores import holds_the_seam
from tests.doubles.waiting import on_a_loop
from tests.peers.environments import moto_python
from tests.peers.test_mooncake import put_by
from tests.system.test_two_hosts import BLOCKS, PATIENT, Engine, daemon

pytestmark = pytest.mark.peers
TOKENS = BLOCKS * PAGE_SIZE


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """AWS_* variables lead to it, and it has `bucket`."""
    port = free_port()
    command = [str(moto_python()), "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process, url = Process("moto", command, tmp_path), f"http://127.0.0.1:{port}"
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ):
        monkeypatch.setenv(name, value)
    try:
        process.wait_until(lambda: made(f"{url}/bucket"), "bucket")
        yield process
    finally:
        process.kill()


def made(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT")):
            return True
    except OSError:
        return False


@on_a_loop
async def _holds_the_seam() -> None:
    store = S3(S3Url("bucket", "a prefix"), None, 20.0)
    await store.ping()
    await holds_the_seam(store)
    with pytest.raises(StoreError):
        await S3(S3Url("another"), None, 20.0).ping()


def test_it_holds_what_every_store_must(server: Process) -> None:
    _holds_the_seam()


def test_a_prefix_of_one_host_is_served_by_another(server: Process, tmp_path: Path) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(daemon(tmp_path / "a", "s3://bucket/hosts", *PATIENT))
        put_by(a, (1, 2))
        b = stack.enter_context(daemon(tmp_path / "b", "s3://bucket/hosts", *PATIENT))
        second = stack.enter_context(Engine(b.address))
        assert second.ask(1) == (TOKENS, TOKENS)
        a.kill()
        assert second.ask(2) == (TOKENS, TOKENS)
        server.kill()
        assert second.ask(3) == (0, 0)
        assert b.stop() == 0

"""What KV depends on divides the cache, and a name doesn't: over the wire and the real cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvc2.config import TenantConfig
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import PAGE_SIZE, identity, layout
from tests.doubles.wires import Wire, grants, hello, memfd, u32

BLOCKS = 4
TOKENS = u32(*range(BLOCKS * PAGE_SIZE + 1))
BASE: dict[str, Any] = {"kv_dtype": "bfloat16", "head_size": 16}  # float16 is as wide


def opened(wire: Wire, engine: str = "first", page_size: int = PAGE_SIZE) -> Wire:
    attached = wire.attach(hello(engine_name=engine, layout=layout(page_size).to_proto()))
    assert wire.side(attached, attached.nonce, [memfd()]) == b"ok"
    assert next(wire.stream).WhichOneof("message") == "ready"
    return wire


def acquire(wire: Wire, *, tenant: str = "", salt: bytes = b"", **changes: Any) -> Any:
    opening = pb.OpenNamespaceRequest(
        session=wire.head,
        identity=identity(**{**BASE, **changes}).encode(),
        tenant=tenant,
        salt=salt,
    )
    number = wire.call("OpenNamespace", opening).namespace_id
    request = pb.AcquireRequest(
        session=wire.head,
        namespace_id=number,
        request_id=b"%d" % number,
        tokens=TOKENS,
        grants=grants(BLOCKS),
    )
    return wire.call("Acquire", request)


@pytest.fixture(scope="module")
def served(tmp_path_factory: Any) -> Iterator[ServedDaemon]:
    """A daemon whose memory and disk hold TOKENS for BASE."""
    folder: Path = tmp_path_factory.mktemp("daemon")
    secret = folder / "other.secret"
    secret.write_bytes(bytes(32))
    secret.chmod(0o600)
    config = serve_config(
        folder, disk=True, write_policy="through", tenants=(TenantConfig("other", secret),)
    )
    with ServedDaemon(config, cache=None) as daemon:
        with Wire(daemon.address) as wire:
            computed = acquire(opened(wire)).granted
            part = pb.LeaseCommit(request_id=b"1", tokens=TOKENS[:-4], pages=computed)
            commit = pb.CommitRequest(session=wire.head, leases=[part])
            assert wire.call("Commit", commit).durable
        yield daemon


def test_an_engine_of_another_name_hits_what_the_first_stored(served: ServedDaemon) -> None:
    with Wire(served.address) as wire:
        assert acquire(opened(wire, "renamed")).matched_tokens == BLOCKS * PAGE_SIZE


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_digest": "cd" * 32},
        {"architecture": "OtherForCausalLM"},
        {"dtypes": (("attention", "float32"), ("experts", "bfloat16"))},
        {"kv_dtype": "float16"},
        {"kv_heads": 2, "head_size": 8},
        {"rope_theta": 1e6},
        {"tenant": "other"},
        {"salt": b"s"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_kv_depends_on_divides_the_cache(served: ServedDaemon, changes: Any) -> None:
    with Wire(served.address) as wire:
        assert acquire(opened(wire), **changes).matched_tokens == 0


def test_another_page_size_hits_nothing(served: ServedDaemon) -> None:
    with Wire(served.address) as wire:
        found = acquire(opened(wire, page_size=8), page_size=8, head_size=32)
        assert found.matched_tokens == 0

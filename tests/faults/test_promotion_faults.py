"""A promotion that fails ends its session: the engine attaches again and isn't left to wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from kvc2.v1 import cache_pb2 as pb
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import PAGE_SIZE
from tests.doubles.wires import Wire, grants, status_of, u32


def test_a_failed_promotion_ends_the_stream_with_a_word(tmp_path: Path) -> None:
    tokens = u32(*range(2 * PAGE_SIZE + 1))
    with ServedDaemon(serve_config(tmp_path), cache=None) as served, Wire(served.address) as wire:
        wire.open()

        def acquire(name: bytes, grant: int) -> pb.AcquireResponse:
            request = pb.AcquireRequest(
                session=wire.head,
                namespace_id=wire.namespace_id,
                request_id=name,
                tokens=tokens,
                grants=grants(grant),
            )
            found: pb.AcquireResponse = wire.call("Acquire", request)
            return found

        lease = pb.LeaseCommit(request_id=b"a", tokens=tokens[:-4], pages=acquire(b"a", 2).granted)
        wire.call("Commit", pb.CommitRequest(session=wire.head, leases=[lease]))
        wire.call("Release", pb.ReleaseRequest(session=wire.head, request_ids=[b"a"]))
        assert wire.call("Evict", pb.EvictRequest(tier="gpu")).evicted_blocks == 2

        def fails(*_: Any, **__: Any) -> None:
            raise OSError("injected")

        (gpu,) = served.daemon.cache._gpus.values()
        gpu.store.write = fails
        acquire(b"b", 0)
        with pytest.raises(grpc.RpcError) as caught:
            next(wire.stream)
        assert status_of(caught.value)[0] == "FAILED_PRECONDITION"
        with Wire(served.address) as again:
            again.open()

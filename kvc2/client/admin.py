"""Calls that need no session: what the command line and an operator's script use."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import grpc

from kvc2 import answers, errors
from kvc2.client import channel
from kvc2.client.asking import explained, meant
from kvc2.host.address import Address
from kvc2.v1 import cache_pb2
from kvc2.wire import from_message

MARGIN_S = 10.0  # on top of a deadline that the daemon keeps itself


class Admin:
    """Raises errors.Unreachable when no daemon answers. Threads may share it."""

    def __init__(self, address: str | Address) -> None:
        self.address = str(address)
        self._daemon = Address.of_daemon(address)
        self._channel = channel.Channel(self._daemon)

    def __enter__(self) -> Admin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def stats(self) -> answers.DaemonStats:
        return from_message(answers.DaemonStats, self._call("Stats", cache_pb2.StatsRequest()))

    def flush(self, deadline_s: float = 30.0) -> answers.Flushed:
        """Wait until all that is committed is durable, at most deadline_s."""
        request = cache_pb2.FlushRequest(deadline_ms=max(1, round(deadline_s * 1000)))
        return from_message(answers.Flushed, self._call("Flush", request, deadline_s))

    def evict(self, tier: str, blocks: int = 0) -> answers.Evicted:
        """Drop unpinned blocks from gpu, cpu or disk; blocks = 0: all of them."""
        answer = self._call("Evict", cache_pb2.EvictRequest(tier=tier, blocks=blocks), 60.0)
        return from_message(answers.Evicted, answer)

    def explain(
        self,
        *,
        request_id: bytes = b"",
        tokens: answers.U32 | answers.Asked | None = None,
        key: bytes = b"",
        namespace: bytes = b"",
    ) -> answers.Explained:
        """Why a recent request hit or missed, or a prompt or an opaque key would now, in any
        session. Needs the unix socket, TLS or a bearer token. namespace: 32 bytes, for `tokens` and
        `key`; empty: the only one. Changes nothing."""
        if key:
            request = cache_pb2.ExplainRequest(key=key, namespace=namespace)
        elif tokens is not None:
            request = explained(tokens)
            request.namespace = namespace
        else:
            request = cache_pb2.ExplainRequest(request_id=request_id)
        return from_message(answers.Explained, self._call("Explain", request))

    def invalidate(
        self, *, weights_digest: str = "", namespace: bytes = b""
    ) -> answers.Invalidated:
        """Kill all blocks computed with these weights (hexadecimal digest), or of one namespace
        (32 bytes). Give one of the two."""
        if namespace:
            request = cache_pb2.InvalidateRequest(namespace=namespace)
        else:
            request = cache_pb2.InvalidateRequest(weights_digest=weights_digest)
        return from_message(answers.Invalidated, self._call("Invalidate", request))

    def set_quota(
        self, tenant: str, tier: str, *, max_bytes: int = 0, max_blocks: int = 0
    ) -> answers.TenantUse:
        """What a declared tenant may take of gpu, cpu or disk until the daemon ends; 0: no limit.
        Answers what it takes now."""
        request = cache_pb2.SetQuotaRequest(
            tenant=tenant, tier=tier, max_bytes=max_bytes, max_blocks=max_blocks
        )
        return from_message(answers.TenantUse, self._call("SetQuota", request).use)

    def pin(
        self,
        what: answers.U32 | answers.Asked,
        *,
        tier: str = "cpu",
        hard: bool,
        ttl_s: int = 0,
        namespace: bytes = b"",
    ) -> answers.PrefixPinned:
        """Keep the full blocks of a prompt, or of opaque keys, in cpu or disk, there or not: hard,
        they are never evicted; else last. ttl_s: how long; 0: until unpin. namespace: 32 bytes;
        empty: the only one. Needs the unix socket, TLS or a bearer token."""
        request = cache_pb2.PinRequest(
            **meant(what),
            tier=tier,
            hard=hard,
            ttl_s=ttl_s,
            namespace=namespace,
        )
        return from_message(answers.PrefixPinned, self._call("Pin", request))

    def unpin(
        self, what: answers.U32 | answers.Asked, *, tier: str = "cpu", namespace: bytes = b""
    ) -> int:
        """End the pin of exactly these blocks, or of each key; how many, 0: there was none."""
        request = cache_pb2.UnpinRequest(
            **meant(what),
            tier=tier,
            namespace=namespace,
        )
        return int(self._call("Unpin", request).blocks)

    def prefetch(
        self,
        what: answers.U32 | answers.Asked,
        *,
        tier: str = "cpu",
        namespace: bytes = b"",
        deadline_s: float = 0.0,
    ) -> answers.Prefetched:
        """Bring a prompt's longest cached prefix, or what is cached of opaque keys, to the cpu
        tier; answers when it is there or the time is over (0: at once), and it goes on. Needs the
        unix socket, TLS or a bearer token."""
        request = cache_pb2.PrefetchRequest(
            **meant(what),
            tier=tier,
            namespace=namespace,
            deadline_ms=round(deadline_s * 1000),
        )
        return from_message(answers.Prefetched, self._call("Prefetch", request, deadline_s))

    def scrub(self, mb_per_s: int | None = None, *, stop: bool = False) -> answers.Scrubbed:
        """Verify the disk's blocks in the background: begin a pass, or give the one under way this
        rate (0: the daemon's 100 MB/s); end it; or (None) only tell how it goes."""
        if stop:
            request = cache_pb2.ScrubRequest(stop=True)
        else:
            request = cache_pb2.ScrubRequest(start_mb_per_s=mb_per_s)
        return from_message(answers.Scrubbed, self._call("Scrub", request))

    def drain(self, deadline_s: float = 30.0) -> answers.Flushed:
        """Flush and end the daemon."""
        request = cache_pb2.DrainRequest(deadline_ms=max(1, round(deadline_s * 1000)))
        return from_message(answers.Flushed, self._call("Drain", request, deadline_s).flushed)

    def _call(self, name: str, request: Any, wait_s: float = 0.0) -> Any:
        if (why := channel.absence(self._daemon)) is not None:
            raise errors.Unreachable(f"no daemon at {self.address}: {why}", why.reason)
        try:
            return self._channel.call(name, request, wait_s + MARGIN_S)
        except grpc.RpcError as error:
            raise channel.translated(error) from error

"""Valkey and Redis as a remote store, by redis-py.

One server, or what looks like one. It evicts by itself (`maxmemory-policy allkeys-lru` is right for
it). Not here: deadlines (link.py): redis-py's are of single reads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio import UnixDomainSocketConnection as UnixConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from typing_extensions import Buffer

from kvc2.host.store_url import StoreUrl
from kvc2.tiers.remote.store import StoreError, StoreRefused

CONNECTIONS_MAX = 16
OTHER_TYPE = "WRONGTYPE"  # under this name is a list or the like: no value
GROUP = 64  # names of one EXISTS: where all or none are there, one answer tells


@asynccontextmanager
async def _told() -> AsyncIterator[None]:
    """Whatever goes wrong is a StoreError: a store may answer anything, also what redis-py can't
    read."""
    try:
        yield
    except ResponseError as error:
        raise StoreRefused(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise StoreError(f"{type(error).__name__}: {error}") from error


class Valkey:
    """A Store. `ca_file`: whom a server's certificate must be signed by; None: by one of those that
    the system trusts."""

    def __init__(self, url: StoreUrl, ca_file: Path | None, deadline_s: float) -> None:
        settings: dict[str, Any] = {
            "db": url.database,
            "username": url.user or None,
            "password": url.password or None,
            "socket_timeout": deadline_s,
            "socket_connect_timeout": deadline_s,
            "retry": Retry(NoBackoff(), 0),  # a fault is a miss: nobody waits for a second try
            "protocol": 2,
        }
        kind: type[Connection | SSLConnection | UnixConnection] = Connection
        if url.path is not None:
            kind, settings["path"] = UnixConnection, str(url.path)
        else:
            settings |= {"host": url.host, "port": url.port}
        if url.tls:
            kind = SSLConnection
            settings |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
            settings["ssl_ca_certs"] = None if ca_file is None else str(ca_file)
        pool = BlockingConnectionPool(
            max_connections=CONNECTIONS_MAX, timeout=deadline_s, connection_class=kind, **settings
        )
        self._client = Redis.from_pool(pool)

    async def exists(self, names: Sequence[bytes]) -> list[bool]:
        groups = [names[first : first + GROUP] for first in range(0, len(names), GROUP)]
        counts = await self._each("EXISTS", [tuple(group) for group in groups])
        mixed = [
            name
            for group, count in zip(groups, counts, strict=True)
            if 0 < count < len(group)
            for name in group
        ]
        alone = iter(await self._each("EXISTS", [(name,) for name in mixed]) if mixed else ())
        return [
            bool(next(alone)) if 0 < count < len(group) else count > 0
            for group, count in zip(groups, counts, strict=True)
            for _ in group
        ]

    async def _each(self, command: str, arguments: Sequence[tuple[bytes, ...]]) -> list[int]:
        """The numbers that a command answers, of each of these."""
        async with _told(), self._client.pipeline(transaction=False) as batch:
            for each in arguments:
                batch.execute_command(command, *each)
            return [int(each) for each in await batch.execute()]

    async def get(self, names: Sequence[bytes], num_bytes: int) -> list[bytes | None]:
        async with _told(), self._client.pipeline(transaction=False) as batch:
            for name in names:
                batch.getrange(name, 0, num_bytes)
            found = await batch.execute(raise_on_error=False)
            errors = [
                each
                for each in found
                if isinstance(each, RedisError) and not str(each).startswith(OTHER_TYPE)
            ]
            if errors and len(errors) == len(found):
                raise errors[0]
            return [each if isinstance(each, bytes) and each else None for each in found]

    async def put(self, values: Sequence[tuple[bytes, Buffer]], ttl_s: int) -> None:
        async with _told(), self._client.pipeline(transaction=False) as batch:
            for name, value in values:
                batch.set(name, memoryview(value), ex=ttl_s or None)
            await batch.execute()

    async def delete(self, names: Sequence[bytes]) -> None:
        async with _told():
            await self._client.unlink(*names)

    async def ping(self) -> None:
        async with _told():
            await self._client.ping()

    async def close(self) -> None:
        try:
            await self._client.aclose(close_connection_pool=True)
        except (RedisError, OSError):
            return  # it is gone already

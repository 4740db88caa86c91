"""Caches of several hosts, in one process, that share a remote store, and an engine over each."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvc2.answers import Acquired
from kvc2.cache import assemble
from kvc2.cache.cache import Cache
from kvc2.cache.namespaces import Owner
from kvc2.cache.remote import Remote
from kvc2.config import RemoteConfig
from kvc2.tiers.remote.codec import Shared, mac_key, shared_key
from tests.doubles.caches import with_arena
from tests.doubles.stand_in import NAMESPACE, U32, StandIn
from tests.doubles.stores import ToldStore
from tests.doubles.waiting import until

SECRET = b"of two hosts that trust each other"


def shared_by(secret: bytes, namespace: bytes = NAMESPACE) -> Shared:
    """The namespace, as hosts with this secret know it."""
    key = shared_key(secret, b"")
    name = hmac.digest(key, namespace, hashlib.sha256)
    return Shared(name, mac_key(key, name))


class SharingEngine(StandIn):
    """Its namespace is shared by the hosts with this secret."""

    def __init__(self, cache: Cache, *, secret: bytes = SECRET, ttl_s: int = 0) -> None:
        self.secret, self.ttl_s = secret, ttl_s
        super().__init__(cache, 64)

    def open(self) -> None:
        super().open()
        self.cache.namespaces._opened.clear()  # opened anew, with an owner
        owner = Owner(shared=shared_by(self.secret, self.namespace))
        self.opened = self.cache.open_namespace(
            self.session, self.namespace, self.identity, self.ttl_s, owner
        )

    async def put(self, tokens: U32) -> None:
        """Commits the prompt, uses it again, and waits until what goes to the store is there."""
        await self.ask(tokens)
        await self.demoted()
        await self.ask(tokens)
        await until(lambda: remote_of(self.cache).idle)

    async def demoted(self) -> None:
        """All that was committed is in the cpu tier."""
        await self.cache.flush(10)

    async def fetched(self, tokens: U32) -> Acquired:
        """A request whose prefix comes from the store; its bytes are judged."""
        return await self.ask(tokens)


def remote_of(cache: Cache) -> Remote:
    assert cache.leases._beyond is not None
    return cache.leases._beyond.remote


def config_of(folder: Path, url: str, **changes: Any) -> RemoteConfig:
    secret = folder / "remote.secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    return RemoteConfig(url=url, secret_file=secret, **changes)


@asynccontextmanager
async def host(
    folder: Path,
    store: ToldStore | str,
    *,
    patience_ms: int = 10_000,
    deadline_ms: int = 20_000,
    queue_mb: int = 1000,
    **more: Any,
) -> AsyncIterator[Cache]:
    """A cache with a disk below `folder` and this store, a server's URL or one that is told what to
    do. Its requests are patient, as a busy machine needs: tests of what it costs say otherwise."""
    folder.mkdir(exist_ok=True)
    url = store if isinstance(store, str) else "redis://nowhere"
    remote = config_of(
        folder, url, patience_ms=patience_ms, deadline_ms=deadline_ms, queue_mb=queue_mb
    )
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(store, ToldStore):
            patch.setattr(assemble, "store_of", lambda config: lambda: store)
        async with with_arena(folder / "disk", remote=remote, **more) as cache:
            await until(lambda: remote_of(cache).link.up)
            yield cache

"""The remote store as the cache uses it: what requests fetch from it, and what goes there behind.

Not here: whether and how a request waits (fetches.py, key_fetches.py), what is put (puts.py),
which kind of store it is (tiers/remote/).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec

from kvc2 import _core, errors, events
from kvc2.cache.arrivals import Arrivals
from kvc2.cache.fetches import Fetches
from kvc2.cache.key_fetches import KeyFetches
from kvc2.cache.landing import Fetch, Means, Prompt
from kvc2.cache.patience import Patience
from kvc2.cache.puts import Puts
from kvc2.config import RemoteConfig, ServeConfig
from kvc2.host.store_url import MooncakeUrl, S3Url
from kvc2.metrics import Metrics, RemoteMetrics
from kvc2.moving.loading import Loader
from kvc2.tiers.pools import Pools
from kvc2.tiers.remote.link import Link
from kvc2.tiers.remote.store import Store

THREADS = 2  # that make names and values, and judge these: about 1 GB/s each

MakeStore = Callable[[], Store]


def store_of(config: RemoteConfig) -> MakeStore:
    """What opens the store of a configuration that has one. Raises StartRefused where the package
    for it is missing."""
    url = config.parsed_url
    if not url.tls and not url.is_local:
        events.warning("remote_in_clear", store=url.shown)
    if isinstance(url, MooncakeUrl):
        return _mooncake(url, config.deadline_s)
    if isinstance(url, S3Url):
        return _s3(url, config)
    try:
        from kvc2.tiers.remote.valkey import Valkey
    except ModuleNotFoundError as error:
        raise _missing(error.name, "remote") from error
    return lambda: Valkey(url, config.ca_file, config.deadline_s)


def _mooncake(url: MooncakeUrl, deadline_s: float) -> MakeStore:
    if find_spec("mooncake") is None:  # its native code is only for a process of its own
        raise _missing("mooncake", "mooncake")
    from kvc2.tiers.remote.mooncake import Mooncake

    return lambda: Mooncake(url, deadline_s)


def _s3(url: S3Url, config: RemoteConfig) -> MakeStore:
    try:
        from kvc2.tiers.remote.s3 import S3
    except ModuleNotFoundError as error:
        raise _missing(error.name, "s3") from error
    return lambda: S3(url, config.ca_file, config.deadline_s)


def _missing(package: str | None, among: str) -> errors.StartRefused:
    return errors.StartRefused(f"remote.url: {package} is missing: pip install 'kvc2[{among}]'")


class Remote:
    """All on the event loop. `make` opens the store. `wake`: there is something to copy to the
    disk. `prompts`, `keys`: what brings blocks of these."""

    def __init__(
        self,
        index: _core.Index,
        pools: Pools,
        make: MakeStore,
        config: ServeConfig,
        metrics: Metrics,
        *,
        wake: Callable[[], None],
    ) -> None:
        of, counted = config.remote, RemoteMetrics(metrics)
        self.link = Link(make, counted, deadline_s=of.deadline_s, patience_s=of.patience_s)
        self._means = Means(
            index, pools, self.link, counted, ThreadPoolExecutor(THREADS, "kvc2-values")
        )
        self._arrivals = Arrivals(self._means, wake=wake)
        always, patience = config.load_policy == "always", Patience(self._means, self._arrivals)
        self.prompts = Fetches(self._means, self._arrivals, patience, always=always)
        self.keys = KeyFetches(self._means, self._arrivals, patience)
        self._puts = Puts(self._means, queue_bytes=of.queue_bytes)
        self._putting: asyncio.Task[None] | None = None

    def start(self, loader: Loader) -> None:
        """Begin to put what is used."""
        self._putting = asyncio.create_task(self._puts.run(loader))

    async def stop(self) -> None:
        """What waits to be put is dropped, and what is under way."""
        if self._putting is not None:
            self._putting.cancel()
            with suppress(asyncio.CancelledError):
                await self._putting
        await self.link.close()
        await self._arrivals.stop()
        await asyncio.to_thread(self._means.threads.shutdown)

    def let_go(self, fetches: Iterable[Fetch]) -> None:
        """By one of the holders of each."""
        for fetch in fetches:
            self._arrivals.let_go(fetch)

    def used(self, prompt: Prompt, blocks: int) -> None:
        """As Puts has it, as the next does."""
        self._puts.used(prompt, blocks)

    def used_keys(self, prompt: Prompt) -> None:
        self._puts.used_keys(prompt)

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be put, nor comes."""
        return self._puts.idle and self._arrivals.idle

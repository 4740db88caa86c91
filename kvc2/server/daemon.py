"""One daemon: opens what it serves with, in order, and closes it in the opposite order.

starting -> serving -> draining -> stopped      health: NOT_SERVING but in `serving`
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from kvc2 import errors, events
from kvc2.answers import SIZES, Flushed
from kvc2.cache.assemble import assemble
from kvc2.cache.cache import Cache
from kvc2.cache.sessions import SessionTable
from kvc2.config import ServeConfig
from kvc2.cuda.nursery import NO_CUDA, CudaHost
from kvc2.host.heap import keep_freed_memory
from kvc2.metrics import Metrics, TierSample
from kvc2.periodic import periodically
from kvc2.server import wiring
from kvc2.server.attach import EXPIRY_CHECK_S, Attachments
from kvc2.server.callers import Callers
from kvc2.server.claim import Claim
from kvc2.server.commits import Commits
from kvc2.server.scrapes import Scrapes
from kvc2.server.session_calls import SessionCalls
from kvc2.server.shared_calls import SharedCalls
from kvc2.server.side import SideSocket
from kvc2.server.streams import Streams
from kvc2.server.tls import ServerTls
from kvc2.server.wiring import Calls

STOP_GRACE_S = 0.5  # for calls under way when the last flush has ended
SCRAPE_S = 1.0


@contextlib.asynccontextmanager
async def running(
    config: ServeConfig,
    *,
    open_cache: Callable[[ServeConfig, Metrics], Awaitable[Cache]] = assemble,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Daemon]:
    """A daemon that serves until the body ends. Raises StartRefused and InvalidConfig. `open_cache`
    and `clock` are where tests put theirs."""
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics()
        claim = Claim(config.listen, ServerTls.of(config.tls, metrics))
        stack.callback(claim.close)
        cache = await open_cache(config, metrics)
        table = SessionTable(max_sessions=config.limits.max_sessions, clock=clock)
        daemon = Daemon(config, metrics, cache, claim, table)
        stack.push_async_callback(daemon.stop_cache)
        await stack.enter_async_context(daemon)
        # of a unix path gRPC says port 1
        port = {} if claim.path is not None else {"port": daemon.port}
        events.event(
            "serving",
            listen=config.listen,
            **port,
            tls=config.tls.files is not None,
            tokens=config.token_file is not None,
            arena_bytes=0 if config.gpu_only else config.cpu.memory_bytes,
            disk=config.disk.path,
            seconds=round(time.monotonic() - started, 3),
        )
        telling = asyncio.create_task(_tell_devices(cache))
        stack.callback(telling.cancel)
        yield daemon


async def _tell_devices(cache: Cache) -> None:
    found = await cache.executors.found()
    facts: dict[str, Any] = {"devices": list(found.devices.items())}
    events.event("cuda", **(facts if found.devices else {"devices": 0, "why": found.why}))


class Daemon:
    """One over an open cache; `running` makes it. `stopped` is set when it was told to stop."""

    def __init__(
        self,
        config: ServeConfig,
        metrics: Metrics,
        cache: Cache,
        claim: Claim,
        table: SessionTable,
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.cache = cache
        self.stopped = asyncio.Event()
        self.port = 0
        self._claim = claim
        self.attachments = Attachments(config, cache, table, metrics)
        callers = Callers(config, table, metrics)
        commits = Commits(config, cache, callers, metrics)
        self.calls = Calls(
            callers,
            SessionCalls(config, cache, self.attachments, callers, commits, metrics),
            SharedCalls(config, cache, callers, metrics, self._drain_call),
            Streams(config.limits, cache, callers, commits),
        )
        self._flushed: asyncio.Task[Flushed] | None = None
        self._deadline = 0.0
        self._server = wiring.open_server(config.limits)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self.metrics_port = 0

    async def __aenter__(self) -> Daemon:
        """Open in order. What was opened is closed again, last first, here and in __aexit__."""
        async with contextlib.AsyncExitStack() as stack:
            self._register()
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            self._bind()
            stack.callback(self._side.close)
            self._serve_metrics(stack)
            self._tell_routers(stack)
            await self._server.start()
            stack.push_async_callback(self._server.stop, STOP_GRACE_S)
            stack.push_async_callback(self.attachments.close)
            expiry = asyncio.create_task(
                periodically(EXPIRY_CHECK_S, self.attachments.expire, self.metrics)
            )
            stack.callback(expiry.cancel)
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            self._opened = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.attachments.draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._opened.aclose()

    async def stop_cache(self) -> None:
        """Flush within what is left of the time to drain, and close the cache."""
        flushed = await self.cache.stop(max(0.0, self._deadline - time.monotonic()))
        not_durable = sum(flushed.not_durable_blocks.values())
        events.event("stopped", durable=flushed.durable_blocks, not_durable=not_durable)

    def _register(self) -> None:
        wiring.register(self._server, self.calls, self.attachments, self.metrics)
        library = wiring.LibraryServices(self._server, self.metrics)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, library)
        names = (*wiring.SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflected = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, library)

    def _bind(self) -> None:
        self.port = self._claim.bind(self._server)
        self.attachments.side_path = str(self._claim.side_path)
        self._side = SideSocket(
            self._claim.side_path, self.attachments.expect, self.attachments.join, self.metrics
        )

    def _serve_metrics(self, stack: contextlib.AsyncExitStack) -> None:
        self._watch_tiers()
        if self.config.metrics_port is None:
            return
        scrapes = Scrapes(self.config.metrics_port, self.metrics.registry)
        self.metrics_port = scrapes.port
        stack.push_async_callback(scrapes.close)

    def _tell_routers(self, stack: contextlib.AsyncExitStack) -> None:
        path = self.config.kv_events.path
        if path is None:
            return
        try:
            from kvc2.server.kv_events import KvEvents, Sockets
        except ModuleNotFoundError as error:
            raise errors.StartRefused(
                f"kv_events.listen: {error.name} is missing: pip install 'kvc2[events]'"
            ) from error
        told = KvEvents(self.config.kv_events, Sockets(path), self.cache.index, self.metrics)
        stack.push_async_callback(asyncio.to_thread, told.close)

    def _watch_tiers(self) -> None:
        loop, own = asyncio.get_running_loop(), threading.get_ident()

        async def on_loop() -> list[TierSample]:
            return tier_samples(self.cache)

        def samples() -> Iterable[TierSample]:
            if threading.get_ident() == own:
                return tier_samples(self.cache)
            return asyncio.run_coroutine_threadsafe(on_loop(), loop).result(SCRAPE_S)

        self.metrics.watch_tiers(samples)

    async def _set_health(self, status: Any) -> None:
        for name in ("", *wiring.SERVICES):
            await self._health.set(name, status)

    async def drain(self, deadline_s: float) -> Flushed:
        """Take nothing new, tell the sessions, flush. The first call's deadline counts."""
        if self._flushed is None:
            self._deadline = time.monotonic() + deadline_s
            self._flushed = asyncio.create_task(self._drain(deadline_s))
        return await asyncio.shield(self._flushed)

    async def _drain(self, deadline_s: float) -> Flushed:
        events.event("draining", deadline_s=deadline_s)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.attachments.notify_drain()
        return await self.cache.flush(deadline_s, insists=False)

    async def _drain_call(self, deadline_s: float) -> Flushed:
        flushed = await self.drain(deadline_s)
        # the answer leaves before the server does: stop() waits STOP_GRACE_S for calls under way
        asyncio.get_running_loop().call_soon(self.stopped.set)
        return flushed

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT drain, within drain_timeout_s, and then set `stopped`."""

        def begin() -> None:
            task = asyncio.ensure_future(self.drain(self.config.drain_timeout_s))
            task.add_done_callback(lambda _: self.stopped.set())

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, begin)


def tier_samples(cache: Cache) -> list[TierSample]:
    """Every tier as /metrics shows it."""
    states = ("free", "private", "resident", "in_flight", "pinned")
    return [
        TierSample(
            each.tier,
            {state: getattr(each, f"{state}_pages") for state in states},
            each.evicted,
            each.last_copies,
            each.refusals,
            dict(zip(SIZES, each.hit_rates, strict=False)),  # none of a tier without pages
        )
        for each in cache.stats().tiers
    ]


async def serve(config: ServeConfig, cuda: CudaHost = NO_CUDA) -> None:
    """Run a daemon until it is told to stop. `cuda`: what was found of it before this process had
    threads. Raises StartRefused and InvalidConfig."""
    keep_freed_memory()
    async with running(config, open_cache=partial(assemble, cuda=cuda)) as daemon:
        daemon.stop_on_signals()
        await daemon.stopped.wait()

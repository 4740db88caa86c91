"""The requests of one HTTP request: their outputs as they come, and their end if the caller leaves.

Not responsible for what a request is made of (service), nor for what is said of it (replies).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fastapi import Request

from engine import request as engine_request
from engine.http.errors import ApiError
from engine.request import Output
from engine.worker import Worker


class Run:
    """Make it on the event loop. Each request is made with `deliver(i)`, then all are submitted.
    `tells_held`: their last outputs say what the daemon has of them."""

    def __init__(self, worker: Worker, *, tells_held: bool = False) -> None:
        self.tells_held = tells_held
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

    def deliver(self, index: int) -> Callable[[Output], None]:
        """Where the outputs of request `index` go to, from any thread."""

        def put(output: Output) -> None:
            with suppress(RuntimeError):  # the loop has closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))

        return put

    async def outputs(
        self, http: Request, requests: list[engine_request.Request]
    ) -> AsyncIterator[tuple[int, Output]]:
        """Submits them; then their outputs, until all have ended or one has failed. Leaving early,
        or a caller who hangs up, cancels what still runs. Raises what Worker.submit does."""
        self._worker.submit(*requests)
        running = dict(enumerate(requests))
        gone = asyncio.create_task(_hung_up(http))
        try:
            while running:
                news = asyncio.create_task(self._outputs.get())
                await asyncio.wait((news, gone), return_when=asyncio.FIRST_COMPLETED)
                if not news.done():
                    news.cancel()
                    raise ApiError(499, "the caller hung up")
                index, output = news.result()
                if output.finish is not None:
                    del running[index]
                yield index, output
                if output.finish == "error":
                    return
        finally:
            gone.cancel()
            for request in running.values():
                self._worker.cancel(request.request_id)


async def _hung_up(http: Request) -> None:
    """Returns when the caller's connection is gone."""
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            return

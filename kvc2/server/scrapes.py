"""GET /metrics over HTTP, on the daemon's loop: an answer a connection, and no wait without an end.

prometheus_client's own server has a thread for each connection, which stays for as long as a client
likes. Not responsible for what is counted (kvc2/metrics.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import email.parser
import socket

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvc2 import errors, events

HEAD_BYTES_MAX = 16 << 10
REQUEST_S = 10.0  # from its connection until its answer is read
CONNECTIONS_MAX = 64  # one more, and the oldest gives up its place
RETRY_S = 1.0  # when descriptors have run out


class Scrapes:
    """Listens on a port of 127.0.0.1 from its start until `close`; 0: any free one. Raises
    InvalidConfig where it can't."""

    def __init__(
        self, port: int, registry: CollectorRegistry, *, request_s: float = REQUEST_S
    ) -> None:
        self._registry = registry
        self._request_s = request_s
        self._answers: list[asyncio.Task[None]] = []  # the oldest first
        # TCP by name: asyncio sets TCP_NODELAY on nothing else
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.setblocking(False)
        try:
            self._listener.bind(("127.0.0.1", port))
            self._listener.listen(CONNECTIONS_MAX)
        except OSError as error:
            self._listener.close()
            allowed = f"a port that can be bound: {error.strerror}"
            raise errors.InvalidConfig("metrics_port", port, allowed) from error
        self.port = int(self._listener.getsockname()[1])
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        tasks = [self._accepting, *self._answers]
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except ConnectionAbortedError:
                continue
            except OSError as error:  # out of descriptors: the connection waits
                events.warning("metrics_not_accepted", reason=str(error.strerror))
                await asyncio.sleep(RETRY_S)
                continue
            if len(self._answers) >= CONNECTIONS_MAX:
                self._answers[0].cancel()
            task = asyncio.create_task(self._answer(accepted))
            self._answers.append(task)
            task.add_done_callback(self._answers.remove)

    async def _answer(self, accepted: socket.socket) -> None:
        gone = (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
        with accepted, contextlib.suppress(*gone):
            async with asyncio.timeout(self._request_s):
                reader, writer = await asyncio.open_connection(sock=accepted, limit=HEAD_BYTES_MAX)
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(await asyncio.to_thread(self._response, head))
                    writer.close()
                    await writer.wait_closed()
                finally:
                    writer.transport.abort()

    def _response(self, head: bytes) -> bytes:
        """In a thread: it is milliseconds of work, and asks this loop for the tiers."""
        request, _, fields = head.decode("latin-1").partition("\r\n")
        if not request.startswith("GET "):
            return b"HTTP/1.1 405 Method Not Allowed\r\nAllow: GET\r\nContent-Length: 0\r\n\r\n"
        accept = email.parser.HeaderParser().parsestr(fields)["accept"] or ""
        encode, kind = choose_encoder(accept)
        body: bytes = encode(self._registry)
        lines = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close"
        return f"HTTP/1.1 200 OK\r\n{lines}\r\n\r\n".encode() + body

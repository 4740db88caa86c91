"""A bucket of S3 for tests: the calls that a remote store makes, over HTTP, in this process."""

from __future__ import annotations

import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

NAME = "bucket"
WHEN = "Mon, 30 Nov 2026 22:00:00 GMT"


class Bucket(ThreadingHTTPServer):
    """`values` by path. `fault`: a status that every call has; `going` is cleared to freeze it."""

    daemon_threads = True
    request_queue_size = 1024  # a client connects once for each call under way; 5 make it wait

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.values: dict[str, bytes] = {}
        self.fault: HTTPStatus | None = None
        self.going = threading.Event()
        self.going.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do_HEAD(self) -> None:
        value = self._value()
        if value is not None:
            self._answer(HTTPStatus.OK, b"", length=len(value))

    def do_GET(self) -> None:
        if "list-type" in self.path:
            if self._may():
                self._answer(HTTPStatus.OK, b"<ListBucketResult></ListBucketResult>")
            return
        value, asked = self._value(), re.search(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if value is None or asked is None:
            return
        begin, end = int(asked[1]), min(int(asked[2]), len(value) - 1)
        if begin >= len(value):
            self._answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"")
            return
        part = f"bytes {begin}-{end}/{len(value)}"
        self._answer(HTTPStatus.PARTIAL_CONTENT, value[begin : end + 1], {"Content-Range": part})

    def do_PUT(self) -> None:
        value = self.rfile.read(int(self.headers["Content-Length"]))
        if self._may():
            self.server.values[self._key()] = value
            self._answer(HTTPStatus.OK, b"")

    def do_POST(self) -> None:
        """Of many deletes."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self._may():
            keys = re.findall("<Key>(.*?)</Key>", body)
            for key in keys:
                self.server.values.pop(key, None)
            deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._answer(HTTPStatus.OK, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def _key(self) -> str:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        return path.removeprefix(f"/{NAME}/")

    def _value(self) -> bytes | None:
        """None: it is answered already."""
        if not self._may():
            return None
        value = self.server.values.get(self._key())
        if value is None:
            self._answer(HTTPStatus.NOT_FOUND, b"")
        return value

    def _may(self) -> bool:
        self.server.going.wait()
        fault = self.server.fault
        if not self.path.startswith(f"/{NAME}"):
            fault = HTTPStatus.NOT_FOUND
        if fault is not None:
            self._answer(fault, b"")
        return fault is None

    def _answer(
        self,
        status: HTTPStatus,
        body: bytes,
        more: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        told = {"ETag": '"e"', "Last-Modified": WHEN, **(more or {})}
        told["Content-Length"] = str(len(body) if length is None else length)
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def bucket() -> Iterator[Bucket]:
    """AWS_* variables lead to it meanwhile."""
    with pytest.MonkeyPatch.context() as patch, Bucket() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        patch.setenv("AWS_ENDPOINT_URL", found.url)
        patch.setenv("AWS_REGION", "eu-central-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        try:
            yield found
        finally:
            found.going.set()
            found.shutdown()
            thread.join()

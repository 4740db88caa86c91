"""An engine without a model, as a process: JSON commands on stdin, one JSON answer a line.

{"do": "attach"}, {"do": "acquire", "id": "r", "tokens": n, "grant": k}, {"do": "commit", ...}: what
it calls is kvc2.client, what it answers is what the call said, or {"error": class name}.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np

from kvc2 import errors
from kvc2.client import LeaseCommit
from tests.doubles.engines import PAGE_SIZE, SEGMENT_BYTES, TinyEngine, identity


class Commands:
    def __init__(self, address: str) -> None:
        self._engine = TinyEngine(address, "process")
        self._client = self._engine.client
        self._namespace = self._client.open_namespace(identity().encode())
        self._granted: dict[str, list[int]] = {}

    def attach(self, timeout_s: float = 10.0) -> dict[str, Any]:
        attached = self._client.wait_attached(timeout_s)
        return {"attached": attached, "refusal": str(self._client.last_refusal)}

    def status(self) -> dict[str, Any]:
        return {
            "state": self._client.state,
            "detached": self._engine.detached,
            "sessions": len(self._engine.granted),
        }

    def acquire(self, id: str, tokens: int, grant: int = 0) -> dict[str, Any]:
        found = self._client.acquire(
            self._namespace, id.encode(), np.arange(tokens, dtype=np.uint32), grant_pages=grant
        )
        self._granted[id] = found.granted_pages.tolist()
        arrived = found.transfer == 0 or self._client.wait_layer(found.transfer, 1, 5.0)
        return {
            "matched": found.matched_tokens,
            "tiers": [found.tiers.gpu, found.tiers.cpu, found.tiers.disk],
            "granted": self._granted[id],
            "arrived": arrived,
            "bytes": [self._content(page) for page in found.prefix_pages.tolist()],
        }

    def _content(self, page: int) -> int:
        """The first byte of a page's first segment."""
        return int(self._engine.pool.map[page * SEGMENT_BYTES])

    def commit(self, id: str, blocks: int) -> dict[str, Any]:
        """Fill granted pages with their block's number and commit them."""
        pages = self._granted[id][:blocks]
        for block, page in enumerate(pages):
            start = page * SEGMENT_BYTES
            self._engine.pool.map[start : start + SEGMENT_BYTES] = bytes([block]) * SEGMENT_BYTES
        tokens = np.arange(blocks * PAGE_SIZE, dtype=np.uint32)
        part = LeaseCommit(id.encode(), 0, tokens, np.array(pages, np.uint32))
        return {"results": self._client.commit([part]).results[0].tolist()}

    def hold(self, seconds: int) -> dict[str, Any]:
        """Hold the interpreter's lock, as a library does that tokenizes a huge prompt."""
        ctypes.PyDLL(None).sleep(seconds)
        return {}

    def share(self) -> dict[str, Any]:
        return {"name": self._client.share().name}

    def release(self, id: str) -> dict[str, Any]:
        self._client.release([id.encode()])
        return {}

    def close(self) -> dict[str, Any]:
        self._client.close()
        return {}


def answer_lines(commands: object) -> None:
    """A method's answer for each line, until there is none."""
    for line in sys.stdin:
        values = json.loads(line)
        try:
            answer = getattr(commands, values.pop("do"))(**values)
        except errors.Kvc2Error as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    answer_lines(Commands(sys.argv[1]))

"""Mooncake Store's client in a process of its own: its calls may block for half a minute, or for
ever, so whoever waits must be able to kill it (mooncake.py).

    python -P mooncake_child.py SOCKET MEMORY BYTES CONFIG      two descriptors that it was given

Values lie in the memory (a memfd, mapped by both), and what is asked and answered goes over the
socket, a line of JSON each:

    <- {"id": 0, "ok": []}                                         set up: it may be called
    -> {"id": 7, "call": "get", "names": [...], "spans": [[offset, bytes], ...]}
    <- {"id": 7, "ok": [length, or -1 where there is none, ...]}
    <- {"id": 8, "error": "why", "refused": false}

It knows nothing of kvc2, so that the Python that has Mooncake can run it. Its configuration is read
by Mooncake's own code. Not here: deadlines; which call is worth making (link.py).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = 16
PR_SET_PDEATHSIG = 1
PROBE_BYTES = 16  # at the end of the memory

# what Mooncake answers in the place of a length, or of 0
NO_SPACE = range(-299, -199)
TOO_SMALL = -600  # the memory that was offered for a value
OF_OBJECT = range(-799, -699)  # not there, there already, being read or written now
NOT_FOUND = -704
TRANSFER_FAILED = range(-899, -799)  # of this value: the node that has it is away


class Failed(Exception):
    """Of a call. refused: the store has answered, and won't."""

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


class Calls:
    """Each of its public methods is a call; several threads make them."""

    def __init__(self, store: Any, memory: mmap.mmap) -> None:
        self._store = store
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._memory = memory
        self._probe = f"kvc2:probe:{uuid.uuid4().hex}"
        self._put = getattr(store, "batch_upsert_from", store.batch_put_from)

    def exists(self, names: list[str], spans: Sequence[Sequence[int]]) -> list[int]:
        found: list[int] = self._store.batch_is_exist(names)
        return self._checked("exists", found)

    def get(self, names: list[str], spans: Sequence[Sequence[int]]) -> list[int]:
        pointers, sizes = self._places(spans)
        found = self._store.batch_get_into(names, pointers, sizes)
        lengths = [self._length(*each) for each in zip(names, spans, found, strict=True)]
        if lengths and all(each in TRANSFER_FAILED for each in lengths):
            raise Failed(f"get: Mooncake answers {lengths[0]}")
        return [max(each, -1) for each in lengths]

    def put(self, names: list[str], spans: Sequence[Sequence[int]]) -> list[int]:
        pointers, sizes = self._places(spans)
        return self._checked("put", self._put(names, pointers, sizes))

    def delete(self, names: list[str], spans: Sequence[Sequence[int]]) -> list[int]:
        return self._checked("delete", self._store.batch_remove(names, True))

    def ping(self, names: list[str], spans: Sequence[Sequence[int]]) -> list[int]:
        """Its health check says that all is well when the master is dead: a value must come back.
        One that is full is there all the same."""
        at = len(self._memory) - PROBE_BYTES
        written, read = [[at, PROBE_BYTES // 2]], [[at + PROBE_BYTES // 2, PROBE_BYTES // 2]]
        try:
            self.put([self._probe], written)
        except Failed as error:
            if error.refused:
                return []
            raise
        if self.get([self._probe], read) != [PROBE_BYTES // 2]:
            raise Failed("ping: what was put does not come back")
        self.delete([self._probe], [])
        return []

    def _places(self, spans: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        return [self._at + offset for offset, _ in spans], [size for _, size in spans]

    def _length(self, name: str, span: Sequence[int], answer: int) -> int:
        """Of what was read of a value; of one that doesn't fit, as much as fits."""
        if answer == TOO_SMALL:
            offset, size = span
            answer = self._store.get_into_ranges(
                [self._at + offset], [[name]], [[[0]]], [[[0]]], [[[size]]]
            )[0][0][0]
        if answer >= 0 or answer in OF_OBJECT or answer in TRANSFER_FAILED:
            return answer
        raise Failed(f"get: Mooncake answers {answer}")

    @staticmethod
    def _checked(call: str, answers: list[int]) -> list[int]:
        for each in answers:
            if each in NO_SPACE:
                raise Failed(f"{call}: Mooncake has no room: {each}", refused=True)
            if each < 0 and each not in OF_OBJECT:
                raise Failed(f"{call}: Mooncake answers {each}")
        return answers


def configured(spec: str) -> Any:
    """Mooncake's own configuration. `file:PATH`: of that file. `env:`: as its variables say.
    `master:HOST:PORT`: the same with this master, and without memory of ours in the store."""
    from mooncake.mooncake_config import MooncakeConfig  # type: ignore[import-not-found]

    kind, _, rest = spec.partition(":")
    if kind == "file":
        return MooncakeConfig.from_file(rest)
    if kind == "master":
        os.environ.pop("MOONCAKE_CONFIG_PATH", None)
        os.environ["MOONCAKE_MASTER"] = rest
        os.environ.setdefault("MOONCAKE_GLOBAL_SEGMENT_SIZE", "0")
        os.environ.setdefault("MOONCAKE_LOCAL_BUFFER_SIZE", str(64 << 20))
    return MooncakeConfig.load_from_env()


def set_up(config: Any) -> Any:
    """A store. Raises Failed."""
    from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

    store = MooncakeDistributedStore()
    known = {
        "local_hostname": config.local_hostname,
        "metadata_server": config.metadata_server,
        "global_segment_size": config.global_segment_size,
        "local_buffer_size": config.local_buffer_size,
        "protocol": config.protocol,
        "rdma_devices": config.device_name or "",
        "master_server_addr": config.master_server_address,
    }
    later = {  # fields that earlier releases don't have
        name: getattr(config, name)
        for name in ("enable_ssd_offload", "ssd_offload_path", "tenant_id")
        if getattr(config, name, "") not in ("", False, "default")
    }
    if getattr(config, "enable_client_http_server", False):
        later |= {"enable_client_http_server": True, "client_http_port": config.client_http_port}
    code = store.setup(**known, **later)
    if code:
        raise Failed(f"Mooncake's setup answers {code} (master {config.master_server_address})")
    return store


def answered(number: int, work: Callable[[], list[int]]) -> dict[str, Any]:
    try:
        return {"id": number, "ok": work()}
    except Exception as error:
        why = str(error) or type(error).__name__
        return {"id": number, "error": why, "refused": getattr(error, "refused", False)}


def main() -> None:
    wire = socket.socket(fileno=int(sys.argv[1]))
    memory = mmap.mmap(int(sys.argv[2]), int(sys.argv[3]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is the daemon's
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died meanwhile
        os._exit(1)
    told, made = threading.Lock(), list[Calls]()

    def tell(answer: dict[str, Any]) -> None:
        with told:
            wire.sendall(json.dumps(answer).encode() + b"\n")

    def begin() -> list[int]:
        store = set_up(configured(sys.argv[4]))
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if code := store.register_buffer(at, len(memory)):
            raise Failed(f"Mooncake's register_buffer answers {code}")
        made.append(Calls(store, memory))
        return []

    tell(answered(0, begin))
    if not made:
        os._exit(1)
    calls, threads = made[0], ThreadPoolExecutor(THREADS)

    def serve(asked: dict[str, Any]) -> None:
        call = getattr(calls, asked["call"])
        tell(answered(asked["id"], lambda: call(asked["names"], asked["spans"])))

    for line in wire.makefile("rb"):
        threads.submit(serve, json.loads(line))
    os._exit(0)  # without a word to Mooncake, which might block


if __name__ == "__main__":
    main()

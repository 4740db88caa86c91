"""Stands in for Mooncake's client (mooncakes.py): its calls as they are published, their answers,
and how it was seen to fail. Values are files of the folder that MOONCAKE_STANDIN names, which all
processes that are told of it share.

The folder's file `fault` says what goes wrong, a word: `dead` (the master is: every call but the
health check fails), `full`, `frozen` (calls wait until it is gone), or `wedged` (a call never ends,
and no other thread of its process runs any more).
"""

import ctypes
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEAD, FULL, TOO_SMALL, NOT_FOUND, LEASED = -900, -200, -600, -704, -706
POLL_S = 0.01


class MooncakeDistributedStore:
    def __init__(self) -> None:
        self._folder = Path(os.environ["MOONCAKE_STANDIN"])

    def setup(
        self,
        local_hostname: str,
        metadata_server: str,
        global_segment_size: int,
        local_buffer_size: int,
        protocol: str,
        rdma_devices: str,
        master_server_addr: str,
        engine: object = None,
        **more: Any,
    ) -> int:
        told = {
            "local_hostname": local_hostname,
            "metadata_server": metadata_server,
            "global_segment_size": global_segment_size,
            "local_buffer_size": local_buffer_size,
            "protocol": protocol,
            "rdma_devices": rdma_devices,
            "master_server_addr": master_server_addr,
            **more,
        }
        (self._folder / "setup.json").write_text(json.dumps(told))
        return DEAD if self._fault() == "dead" else 0

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        return 0

    def health_check(self) -> int:
        return 0  # also when the master is dead

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        if self._fault() == "dead":
            return [DEAD] * len(keys)
        return [int(self._file(each).exists()) for each in keys]

    def batch_get_into(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        if self._fault() == "dead":
            return [DEAD] * len(keys)
        return [self._get(*each) for each in zip(keys, buffer_ptrs, sizes, strict=True)]

    def get_into_ranges(
        self,
        buffer_ptrs: list[int],
        all_keys: list[list[str]],
        all_dst_offsets: list[list[list[int]]],
        all_src_offsets: list[list[list[int]]],
        all_sizes: list[list[list[int]]],
    ) -> list[list[list[int]]]:
        """Of one range."""
        ((key,),), (((to,),),), (((begin,),),), (((size,),),) = (
            all_keys,
            all_dst_offsets,
            all_src_offsets,
            all_sizes,
        )
        part = self._file(key).read_bytes()[begin : begin + size]
        ctypes.memmove(buffer_ptrs[0] + to, part, len(part))
        return [[[len(part)]]]

    def batch_put_from(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """What is there stays as it is."""
        there = [self._file(each).exists() for each in keys]
        lacking = [i for i, each in enumerate(there) if not each]
        answers = self.batch_upsert_from(
            [keys[i] for i in lacking],
            [buffer_ptrs[i] for i in lacking],
            [sizes[i] for i in lacking],
        )
        by_place = dict(zip(lacking, answers, strict=True))
        return [by_place.get(i, 0) for i in range(len(keys))]

    def batch_upsert_from(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        fault = self._fault()
        if fault in ("dead", "full"):
            return [DEAD if fault == "dead" else FULL] * len(keys)
        for key, pointer, size in zip(keys, buffer_ptrs, sizes, strict=True):
            fresh = self._file(key).with_suffix(f".{os.getpid()}")
            fresh.write_bytes(ctypes.string_at(pointer, size))
            fresh.rename(self._file(key))
        return [0] * len(keys)

    def batch_remove(self, keys: Sequence[str], force: bool = False) -> list[int]:
        if self._fault() == "dead":
            return [DEAD] * len(keys)
        if not force:
            return [LEASED] * len(keys)  # it was read just now
        there = [self._file(each) for each in keys]
        answers = [0 if each.exists() else NOT_FOUND for each in there]
        for each in there:
            each.unlink(missing_ok=True)
        return answers

    def _get(self, key: str, pointer: int, size: int) -> int:
        try:
            value = self._file(key).read_bytes()
        except FileNotFoundError:
            return NOT_FOUND
        if len(value) > size:
            return TOO_SMALL
        ctypes.memmove(pointer, value, len(value))
        return len(value)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key.encode().hex()}.value"

    def _fault(self) -> str:
        """What goes wrong now, when the call may go on."""
        while True:
            try:
                fault = (self._folder / "fault").read_text()
            except FileNotFoundError:
                return ""
            if fault == "wedged":
                ctypes.PyDLL(None).pause()  # keeps the interpreter's lock
            if fault != "frozen":
                return fault
            time.sleep(POLL_S)

"""Buckets of S3, and of what speaks as it does, as a remote store, by obstore: a cold one, that
keeps what a restart of memory would lose.

Each name costs a request of its own, so that many go at a time. AWS_* variables name the endpoint,
the region and the keys, as obstore reads them. Not here: deadlines (link.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store
from typing_extensions import Buffer

from kvc2.host.store_url import S3Url
from kvc2.tiers.remote.store import StoreError, StoreRefused, StoreUnable

REQUESTS_MAX = 64  # at a time, of all calls
EMPTY = "416 Range Not Satisfiable"  # of a value without a byte
FULL = ("507 Insufficient Storage", "QuotaExceeded", "StorageFull")
SHOWN_MAX = 200  # letters of an error: more is how its library came to it
Given = TypeVar("Given")
Found = TypeVar("Found")


class S3:
    """A Store. It can't let go of one value after a time: a bucket's rules are of all."""

    def __init__(self, url: S3Url, ca_file: Path | None, deadline_s: float) -> None:
        wait = timedelta(seconds=deadline_s)
        options: dict[str, Any] = {"timeout": wait, "connect_timeout": wait}
        options["allow_http"] = not url.tls
        if ca_file is not None:
            options["root_certificate"] = ca_file.read_bytes()
        self._store = S3Store(
            url.bucket,
            prefix=url.prefix or None,
            client_options=options,  # type: ignore[arg-type]
            retry_config={"max_retries": 0},  # a fault is a miss: nobody waits for a second try
        )
        self._turns = asyncio.Semaphore(REQUESTS_MAX)

    async def exists(self, names: Sequence[bytes]) -> list[bool]:
        async def there(name: bytes) -> bool:
            await obstore.head_async(self._store, name.decode("latin-1"))
            return True

        return [bool(each) for each in await self._each(there, names)]

    async def get(self, names: Sequence[bytes], num_bytes: int) -> list[bytes | None]:
        async def read(name: bytes) -> bytes:
            found = await obstore.get_async(
                self._store, name.decode("latin-1"), options={"range": (0, num_bytes + 1)}
            )
            return bytes(await found.bytes_async())

        return [each or None for each in await self._each(read, names)]

    async def put(self, values: Sequence[tuple[bytes, Buffer]], ttl_s: int) -> None:
        if ttl_s:
            raise StoreUnable("S3 keeps no time for one value: what has a time to live is not put")

        async def write(value: tuple[bytes, Buffer]) -> bool:
            name = value[0].decode("latin-1")
            await obstore.put_async(self._store, name, bytes(value[1]), use_multipart=False)
            return True

        if not all(await self._each(write, values)):
            raise StoreError("there is no such bucket")

    async def delete(self, names: Sequence[bytes]) -> None:
        async def remove(group: Sequence[bytes]) -> bool:
            await obstore.delete_async(self._store, [each.decode("latin-1") for each in group])
            return True

        await self._each(remove, [names])

    async def ping(self) -> None:
        """Whether the bucket is there: that a name is not there doesn't tell."""

        async def first(chunk_size: int) -> bool:
            async for _ in obstore.list(self._store, chunk_size=chunk_size):
                break
            return True

        if not all(await self._each(first, [1])):
            raise StoreError("there is no such bucket")

    async def close(self) -> None:
        return  # connections end with the process

    async def _each(
        self, work: Callable[[Given], Awaitable[Found]], given: Iterable[Given]
    ) -> list[Found | None]:
        """Of each what it came to; None: there is none. Raises StoreError."""

        async def one(item: Given) -> Found | None:
            async with self._turns:
                return await work(item)

        answers = await asyncio.gather(*map(one, given), return_exceptions=True)
        return [_judged(each) for each in answers]


def _judged(answer: Found | BaseException | None) -> Found | None:
    """Raises StoreError."""
    if not isinstance(answer, BaseException):
        return answer
    text = str(answer)
    if isinstance(answer, FileNotFoundError) or EMPTY in text:
        return None
    told = f"{type(answer).__name__}: {text.partition(chr(10))[0][:SHOWN_MAX]}"
    refused = isinstance(answer, PermissionDeniedError | UnauthenticatedError)
    if refused or any(each in text for each in FULL):
        raise StoreRefused(told) from answer
    if isinstance(answer, Exception):
        raise StoreError(told) from answer
    raise answer

"""What an engine may say of itself when it attaches, and what it is told then.

Not here: the stream that it comes on, and the session's life (attach.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvc2 import errors
from kvc2.answers import Limits
from kvc2.cache.sessions import EXPIRY_S
from kvc2.config import ServeConfig
from kvc2.cuda.nursery import Found
from kvc2.layout import Layout
from kvc2.server import checks
from kvc2.v1 import cache_pb2

WIRE_VERSIONS = (2, 2)  # the lowest and the highest that this daemon speaks
MEMORY_BYTES_MAX = 1 << 44
EXPIRY_MS_MAX = 30_000
MEMFD, ON_DEVICE = 0, 1  # kinds of a pool's memory
DEVICE_BYTES_MAX = 64


@dataclass(frozen=True)
class Greeting:
    """A Hello that was checked. The pool's memory comes over the side socket, unless it has no
    bytes. `device`: the UUID of the one that has it; empty: it is a memfd. `arena`: whether the
    arena is handed out there. `kept_pages`: as the wire has them."""

    wire_version: int
    engine_name: str
    layout: Layout
    num_pages: int
    memory_bytes: int
    device: str
    kept_pages: bytes
    arena: bool
    expiry_s: float


def check(first: cache_pb2.AttachRequest, config: ServeConfig) -> Greeting:
    """The Hello of a stream's first message. Raises InvalidRequest and Reserved with the field's
    name."""
    if first.WhichOneof("message") != "hello":
        raise errors.InvalidRequest("message", None, "hello must be the first")
    hello = first.hello
    version = _version(hello)
    checks.known(first)  # behind the version: another one has other fields
    checks.text("hello.engine_name", hello.engine_name, checks.ENGINE_NAME_BYTES_MAX)
    if len(hello.pools) != 1:
        raise errors.InvalidRequest("hello.pools", f"{len(hello.pools)} of them", "one")
    if hello.arena and config.gpu_only:
        raise errors.InvalidRequest("hello.arena", True, "false: this daemon has no cpu tier")
    if hello.expiry_ms > EXPIRY_MS_MAX:
        raise errors.InvalidRequest("hello.expiry_ms", hello.expiry_ms, f"at most {EXPIRY_MS_MAX}")
    pool = hello.pools[0]
    return Greeting(
        wire_version=version,
        engine_name=hello.engine_name,
        layout=_layout(pool, config),
        num_pages=pool.num_pages,
        memory_bytes=pool.memory_bytes,
        device=pool.device,
        kept_pages=pool.kept_pages,
        arena=hello.arena,
        expiry_s=hello.expiry_ms / 1000 or EXPIRY_S,
    )


def _version(hello: cache_pb2.Hello) -> int:
    """The highest that both speak."""
    lowest, highest = WIRE_VERSIONS
    theirs = (hello.wire_version_min or hello.wire_version, hello.wire_version)
    found = min(highest, theirs[1])
    if found < max(lowest, theirs[0]):
        spoken = str(theirs[1]) if theirs[0] == theirs[1] else f"{theirs[0]} to {theirs[1]}"
        mine = str(highest) if lowest == highest else f"{lowest} to {highest}"
        raise errors.InvalidRequest("hello.wire_version", spoken, f"this daemon speaks {mine}")
    return found


def _layout(pool: cache_pb2.Pool, config: ServeConfig) -> Layout:
    """Of a pool whose other fields are sound."""
    for name, only in (("component", 0), ("reach", 0), ("part", 0)):
        checks.reserved(f"hello.pools[0].{name}", getattr(pool, name), only)
    checks.reserved("hello.pools[0].parts", pool.parts, 1)
    _check_kind(pool)
    most = config.limits.max_pool_pages
    if pool.num_pages > most:
        raise errors.InvalidRequest("hello.pools[0].num_pages", pool.num_pages, f"0 to {most}")
    if pool.memory_bytes > MEMORY_BYTES_MAX or bool(pool.memory_bytes) != bool(pool.num_pages):
        raise errors.InvalidRequest(
            "hello.pools[0].memory_bytes",
            pool.memory_bytes,
            f"1 to {MEMORY_BYTES_MAX}, or 0 for a pool of no pages",
        )
    layout = Layout.from_proto(pool.layout)
    if pool.num_pages:
        layout.check_fits(pool.num_pages, pool.memory_bytes)
    wanted = config.attn.page_size
    if wanted is not None and layout.page_size != wanted:
        raise errors.InvalidRequest(
            "layout.page_size", layout.page_size, f"attn.page_size of the daemon: {wanted}"
        )
    return layout


def _check_kind(pool: cache_pb2.Pool) -> None:
    """Whether the fields of a pool's memory agree. Which devices there are is known later."""
    if pool.memory_kind not in (MEMFD, ON_DEVICE):
        allowed = f"{MEMFD} (a sealed memfd) or {ON_DEVICE} (memory of a CUDA device)"
        raise errors.Reserved("hello.pools[0].memory_kind", pool.memory_kind, allowed)
    checks.text("hello.pools[0].device", pool.device, DEVICE_BYTES_MAX)
    on_device = pool.memory_kind == ON_DEVICE
    if on_device != bool(pool.device) or (on_device and not pool.num_pages):
        allowed = "the UUID of the device that has the pages, for memory_kind 1, and only then"
        raise errors.InvalidRequest("hello.pools[0].device", pool.device, allowed)


def check_device(uuid: str, found: Found) -> None:
    """Raises InvalidRequest for a device that this host doesn't have."""
    if uuid not in found.devices:
        told = ", ".join(found.devices) or f"none: the daemon found no CUDA device: {found.why}"
        raise errors.InvalidRequest("hello.pools[0].device", uuid, told)


def limits(config: ServeConfig) -> Limits:
    """What an engine is told, so that nothing of its own has to be as large."""
    of = config.limits
    return Limits(
        max_tokens=of.max_tokens,
        max_leases=of.max_leases,
        max_namespaces=of.max_namespaces,
        max_leases_per_call=of.max_leases_per_call,
        max_grant_pages=of.max_grant_pages,
        max_keys=of.max_keys,
        max_message_bytes=of.message_bytes,
        acquire_deadline_ms=config.acquire_deadline_ms,
        max_streams=of.max_streams,
    )

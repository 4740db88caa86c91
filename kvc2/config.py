"""The daemon's configuration: frozen dataclasses, composed; validated once, when they are made.

A key of the YAML file is a field's name, in its section; its flag is --section-key with dashes
(`cpu: {memory_size_gb: 500}` is --cpu-memory-size-gb 500).
Sizes in `gb` are 10^9 bytes.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from kvc2 import errors, machine
from kvc2.address import SOCKET_PATH_BYTES_MAX, Address
from kvc2.machine import GB as GB
from kvc2.paths import user_path

ALIGNMENT = 4096
ARENA_SHARE = 0.25  # of available memory: the machine is also there for others
DISK_SHARE = 0.25  # of the file system's size, which a restart doesn't change
ARENA_BYTES_MIN = 1 << 20
SIDE_ENDING = ".side"  # the side socket lies beside the main one
TTL_S_MAX = (1 << 32) - 1
DEFAULT_TENANT = "default"
WritePolicy = Literal["behind", "back", "through"]
LoadPolicy = Literal["faster", "always"]
Durability = Literal["durable", "relaxed"]
Admission = Literal["always", "second_access"]
EvictionPolicy = Literal["hazard", "lru", "arc", "s3fifo"]  # see csrc/index/eviction


def default_listen() -> str:
    """unix:$XDG_RUNTIME_DIR/kvc2/kvc2.sock, or below /tmp/kvc2-UID where that is not set, or not
    an absolute path, which its specification has us ignore."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime) / "kvc2" if runtime[:1] == "/" else Path(f"/tmp/kvc2-{os.getuid()}")
    return f"unix:{folder / 'kvc2.sock'}"


def listen_address(listen: str) -> Address:
    """Of a unix: path or a loopback HOST:PORT, port 0: any free one. Raises InvalidConfig."""
    most = SOCKET_PATH_BYTES_MAX - len(SIDE_ENDING)
    try:
        address = Address.parse(listen, field="listen", path_bytes_max=most)
    except errors.InvalidRequest as error:
        raise errors.InvalidConfig("listen", listen, error.allowed) from error
    if address.path is None and not _is_loopback(address.host):
        raise errors.InvalidConfig(
            "listen", listen, "a loopback address: a public one needs mTLS, which is not built"
        )
    return address


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def config_path(field: str, text: str | Path) -> Path:
    """An absolute path; a leading ~ is a home. Raises InvalidConfig."""
    try:
        return user_path(field, text)
    except errors.InvalidRequest as error:
        raise errors.InvalidConfig(field, error.value, error.allowed) from error


def _check(key: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise errors.InvalidConfig(key, value, f"{low:g} to {high:g}")


NUMA = re.compile(r"interleave|local|\d{1,3}(-\d{1,3})?(,\d{1,3}(-\d{1,3})?)*")


@dataclass(frozen=True)
class CpuConfig:
    """The arena. memory_size_gb: None is a quarter of the memory available at start. numa:
    interleave, local, or nodes as Linux lists them: 0 or 0,2 or 0-1 (numa.py)."""

    memory_size_gb: float | None = None
    numa: str = "interleave"

    def __post_init__(self) -> None:
        if not NUMA.fullmatch(self.numa):
            allowed = "interleave, local, or nodes such as 0,2"
            raise errors.InvalidConfig("cpu.numa", self.numa, allowed)
        if self.memory_size_gb is None:
            share = machine.available_memory_bytes() * ARENA_SHARE / GB
            object.__setattr__(self, "memory_size_gb", max(share, ARENA_BYTES_MIN / GB))
        _check("cpu.memory_size_gb", self.memory_size_gb or 0, ARENA_BYTES_MIN / GB, 1e6)

    @property
    def memory_bytes(self) -> int:
        assert self.memory_size_gb is not None
        return round(self.memory_size_gb * GB) // ALIGNMENT * ALIGNMENT

    @classmethod
    def of_bytes(cls, memory_bytes: int) -> CpuConfig:
        return cls(memory_size_gb=memory_bytes / GB)


@dataclass(frozen=True)
class DiskConfig:
    """Slab files and catalogue. path None: no disk tier. size_gb None: a quarter of the file
    system that holds the path. durability: durable syncs each batch before its records are
    committed; relaxed syncs at a flush only, so that a power cut may cost what came since, as
    misses that a load detects. admission: second_access copies a block to disk only once a request
    has matched it after the one that committed it. scrub_mb_per_s: verify all blocks at this rate
    after the start and a day after each pass; 0: only when asked (kvc2 scrub)."""

    path: Path | None = None
    size_gb: float | None = None
    durability: Durability = "durable"
    admission: Admission = "always"
    scrub_mb_per_s: int = 0

    def __post_init__(self) -> None:
        _check("disk.scrub_mb_per_s", self.scrub_mb_per_s, 0, 1_000_000)
        if self.admission not in get_args(Admission):
            allowed = "always or second_access"
            raise errors.InvalidConfig("disk.admission", self.admission, allowed)
        if self.durability not in get_args(Durability):
            raise errors.InvalidConfig("disk.durability", self.durability, "durable or relaxed")
        if self.path is None:
            if self.size_gb is not None:
                raise errors.InvalidConfig("disk.size_gb", self.size_gb, "only with disk.path")
            return
        object.__setattr__(self, "path", config_path("disk.path", self.path))
        if self.size_gb is None:
            object.__setattr__(self, "size_gb", _file_system_bytes(self.path) * DISK_SHARE / GB)
        _check("disk.size_gb", self.size_gb or 0, 0.001, 1e7)

    @property
    def size_bytes(self) -> int:
        return 0 if self.size_gb is None else round(self.size_gb * GB) // ALIGNMENT * ALIGNMENT

    @classmethod
    def of_bytes(
        cls,
        path: Path,
        size_bytes: int,
        durability: Durability = "durable",
        admission: Admission = "always",
    ) -> DiskConfig:
        size_gb = size_bytes / GB
        return cls(path=path, size_gb=size_gb, durability=durability, admission=admission)


def _file_system_bytes(path: Path) -> int:
    try:
        return machine.file_system_bytes(path)
    except OSError as error:
        allowed = f"a folder that can be made: {error.strerror}"
        raise errors.InvalidConfig("disk.path", str(path), allowed) from error


@dataclass(frozen=True)
class AttnConfig:
    """The engine's page and chunk size, where a file shared with it names them; else None."""

    page_size: int | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        size = self.page_size
        if size is not None and not (1 <= size <= 512 and size & (size - 1) == 0):
            raise errors.InvalidConfig("attn.page_size", size, "a power of two from 1 to 512")
        if self.chunk_size is not None and (
            self.chunk_size < 1 or self.chunk_size % (self.page_size or 1)
        ):
            raise errors.InvalidConfig(
                "attn.chunk_size", self.chunk_size, "a multiple of attn.page_size"
            )


@dataclass(frozen=True)
class LimitsConfig:
    """What one daemon takes on; a call beyond one is refused with the limit's name."""

    max_sessions: int = 64
    max_namespaces: int = 1024  # of a session
    max_known_namespaces: int = 1 << 16  # of all sessions since the start, and on disk
    max_layouts: int = 64  # the same
    max_dead_blocks: int = 1 << 16  # that explain remembers; 32 bytes each
    max_leases: int = 4096  # of a session
    max_leases_per_call: int = 1024  # of a commit or release
    max_tokens: int = 1 << 20  # of a prompt
    max_pool_pages: int = 1 << 24
    max_grant_pages: int = 1 << 16
    hard_pin_percent: int = 25  # of a tier, that can't be evicted

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_sessions", 1, 4096),
            ("max_namespaces", 1, 1 << 20),
            ("max_known_namespaces", 1, 1 << 24),
            ("max_layouts", 1, 4096),
            ("max_dead_blocks", 0, 1 << 28),
            ("max_leases", 1, 1 << 20),
            ("max_leases_per_call", 1, 1 << 16),
            ("max_tokens", 1, 1 << 24),
            ("max_pool_pages", 1, 1 << 31),
            ("max_grant_pages", 1, 1 << 24),
            ("hard_pin_percent", 0, 90),
        ):
            _check(f"limits.{name}", getattr(self, name), low, high)

    @property
    def message_bytes(self) -> int:
        """The largest message, both ways: a prompt's tokens and as many page ids, and room."""
        return 8 * self.max_tokens + (1 << 20)


@dataclass(frozen=True)
class TenantConfig:
    """A tenant: secret_file holds at least 16 bytes, readable by its owner alone; uids are the user
    ids that may open its namespaces, empty: the socket's owner; `default`, who names no tenant, has
    neither here. ttl_s: how long after its last use
    a block of it matches, 0: for ever. gpu_gb, cpu_gb, disk_gb: what it may take of a tier (of the
    pools of all engines), 10^9 bytes; max_blocks: the same in blocks of each tier; 0: no limit."""

    name: str
    secret_file: Path | None = None
    uids: tuple[int, ...] = ()
    ttl_s: int = 0
    gpu_gb: float = 0.0
    cpu_gb: float = 0.0
    disk_gb: float = 0.0
    max_blocks: int = 0

    def bytes_of(self, tier: str) -> int:
        """Its quota of gpu, cpu or disk; 0: no limit."""
        return round({"gpu": self.gpu_gb, "cpu": self.cpu_gb, "disk": self.disk_gb}[tier] * GB)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.name):
            raise errors.InvalidConfig("tenants.name", self.name, "1 to 64 of A-Z a-z 0-9 _ . -")
        if self.name == DEFAULT_TENANT:
            self._check_default()
        elif self.secret_file is None:
            raise errors.InvalidConfig("tenants.secret_file", None, f"a path, for {self.name}")
        else:
            path = config_path("tenants.secret_file", self.secret_file)
            object.__setattr__(self, "secret_file", path)
        _check("tenants.ttl_s", self.ttl_s, 0, TTL_S_MAX)
        for name in ("gpu_gb", "cpu_gb", "disk_gb"):
            _check(f"tenants.{name}", getattr(self, name), 0, 1e6)
        _check("tenants.max_blocks", self.max_blocks, 0, 1 << 40)

    def _check_default(self) -> None:
        if self.secret_file is not None:
            path = str(self.secret_file)
            raise errors.InvalidConfig("tenants.secret_file", path, "none for default")
        if self.uids:
            raise errors.InvalidConfig("tenants.uids", self.uids, "none for default")


@dataclass(frozen=True)
class ServeConfig:
    """`kvc2 serve`, whole. Raises InvalidConfig with key, value and what is allowed.

    listen: unix:PATH or HOST:PORT of a loopback address. metrics_port: of /metrics on 127.0.0.1,
    None: off. gpu_only: no arena, no disk. slab_bytes: a multiple of 4096. copy_threads: 0 is one
    a core, at most 4. write_policy: behind copies a commit to slower tiers soon, back only when
    free pages run short, through before the commit is answered (or after 3 s). load_policy: faster
    leaves to the engine what it would compute sooner than it came, always does not.
    eviction_policy: what every tier evicts first; hazard learns from the traffic how soon which
    kind of block comes back, the others are lru, arc and s3fifo on the leaves of the tree.
    low_watermark: when less than this share of a gpu or cpu pool is free, copies that a slower tier
    also holds are dropped until high_watermark is, before anybody waits for a page; 0: only when
    one is needed.
    """

    listen: str = field(default_factory=default_listen)
    metrics_port: int | None = None
    gpu_only: bool = False
    write_policy: WritePolicy = "behind"
    load_policy: LoadPolicy = "faster"
    eviction_policy: EvictionPolicy = "hazard"
    slab_bytes: int = 64 << 20
    low_watermark: float = 0.01  # what a 4k prompt takes of a pool of some GB; a hit rate's worth
    high_watermark: float = 0.02
    copy_threads: int = 0
    acquire_deadline_ms: int = 2000
    drain_timeout_s: float = 30.0
    log_format: Literal["text", "json"] = "text"
    cpu: CpuConfig = field(default_factory=CpuConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)
    attn: AttnConfig = field(default_factory=AttnConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    tenants: tuple[TenantConfig, ...] = ()

    def __post_init__(self) -> None:
        listen_address(self.listen)
        if self.metrics_port is not None:
            _check("metrics_port", self.metrics_port, 0, 65535)
        if self.write_policy not in get_args(WritePolicy):
            raise errors.InvalidConfig("write_policy", self.write_policy, "behind, back or through")
        if self.load_policy not in get_args(LoadPolicy):
            raise errors.InvalidConfig("load_policy", self.load_policy, "faster or always")
        if self.eviction_policy not in get_args(EvictionPolicy):
            raise errors.InvalidConfig(
                "eviction_policy", self.eviction_policy, "hazard, lru, arc or s3fifo"
            )
        if self.log_format not in ("text", "json"):
            raise errors.InvalidConfig("log_format", self.log_format, "text or json")
        _check("slab_bytes", self.slab_bytes, 1 << 16, 1 << 32)
        if self.slab_bytes % ALIGNMENT:
            raise errors.InvalidConfig("slab_bytes", self.slab_bytes, "a multiple of 4096")
        _check("low_watermark", self.low_watermark, 0, 0.5)
        _check("high_watermark", self.high_watermark, self.low_watermark, 0.9)
        _check("copy_threads", self.copy_threads, 0, 256)
        if self.copy_threads == 0:
            cores = len(os.sched_getaffinity(0))
            object.__setattr__(self, "copy_threads", min(cores, 4))  # memory is full with 4
        _check("acquire_deadline_ms", self.acquire_deadline_ms, 1, 600_000)
        _check("drain_timeout_s", self.drain_timeout_s, 0, 3600)
        if self.gpu_only and self.disk.path is not None:
            object.__setattr__(self, "disk", DiskConfig())
        names = [each.name for each in self.tenants]
        if len(set(names)) != len(names):
            raise errors.InvalidConfig("tenants", names, "each name once")

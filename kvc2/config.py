"""The daemon's configuration: frozen dataclasses, composed; validated once, when they are made.

A field is all there is of a flag: its key in the file, its option, help and errors are made of it
(flags.py). Sizes in `gb` are 10^9 bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from kvc2 import errors
from kvc2.flags import (
    Flag,
    at_least,
    between,
    check,
    each_matching,
    matching,
    multiple_of,
    power_of_two,
    refused_as,
)
from kvc2.host import machine
from kvc2.host.address import SOCKET_PATH_BYTES_MAX, Address
from kvc2.host.loopback import is_loopback
from kvc2.host.machine import GB as GB
from kvc2.host.store_url import AnyUrl, masked
from kvc2.host.store_url import parse as parse_store
from kvc2.host.tls import TlsFiles

ALIGNMENT = 4096
ARENA_SHARE = 0.25  # of available memory: the machine is also there for others
DISK_SHARE = 0.25  # of the file system's size, which a restart doesn't change
ARENA_BYTES_MIN = 1 << 20
SIDE_ENDING = ".side"  # the side socket lies beside the main one
REPLAY_ENDING = ".replay"  # and the one for replays of KV events beside theirs
TOPICS = "up to 256 visible ASCII characters"
CERTIFICATE_NAMES = each_matching(
    r"[!-~]([ -~]{0,254}[!-~])?", "names of 1 to 256 printable ASCII characters"
)
TTL_S_MAX = (1 << 32) - 1
DEFAULT_TENANT = "default"
ADMINISTRATOR = "administrator"  # in a token file, in the place of a tenant
WritePolicy = Literal["behind", "back", "through"]
LoadPolicy = Literal["faster", "always"]
Durability = Literal["durable", "relaxed"]
DiskAdmission = Literal["always", "second_access"]
Admission = Literal["worth", "always"]
LogFormat = Literal["text", "json"]
EvictionPolicy = Literal["hazard", "lru", "arc", "s3fifo"]  # see csrc/index/eviction


def default_listen() -> str:
    """unix:$XDG_RUNTIME_DIR/kvc2/kvc2.sock, or below /tmp/kvc2-UID where that is not set, or not
    an absolute path, which its specification has us ignore."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime) / "kvc2" if runtime[:1] == "/" else Path(f"/tmp/kvc2-{os.getuid()}")
    return f"unix:{folder / 'kvc2.sock'}"


def listen_address(listen: str) -> Address:
    """Of a unix: path or HOST:PORT, port 0: any free one. Raises InvalidConfig."""
    most = SOCKET_PATH_BYTES_MAX - len(SIDE_ENDING)
    with refused_as("listen", listen):
        return Address.parse(listen, field="listen", path_bytes_max=most)


NUMA = r"interleave|local|\d{1,3}(-\d{1,3})?(,\d{1,3}(-\d{1,3})?)*"  # nodes as Linux lists them


@dataclass(frozen=True)
class TlsConfig:
    """TLS of a listener on TCP. With client_ca its clients show certificates too (mTLS); without,
    each call shows a bearer token. Which names are a tenant's: `tenants`."""

    certificate: Annotated[
        Path | None,
        Flag(
            "The daemon's certificate, and those between it and its CA, in PEM. Each connection "
            "begins with what the three files hold then.",
            shown="no TLS",
        ),
    ] = None
    key: Annotated[
        Path | None, Flag("Its key in PEM, in clear, readable by its owner alone.", shown="no TLS")
    ] = None
    client_ca: Annotated[
        Path | None,
        Flag(
            "In PEM; one of these has signed each client's certificate. With token_file a client "
            "needs none where this isn't given.",
            shown="no client shows a certificate",
        ),
    ] = None
    administrators: Annotated[
        tuple[str, ...],
        Flag(
            "A certificate with one of these names may do what a unix socket's owner may: flush, "
            "evict, drain, stats and so on, and all as the default tenant. Its alternative names "
            "count, or the common name of one without these. May be given several times.",
            CERTIFICATE_NAMES,
        ),
    ] = ()

    def __post_init__(self) -> None:
        check(self, "tls")
        given = {name: getattr(self, name) for name in ("certificate", "key")}
        missing = [name for name, path in given.items() if path is None]
        if len(missing) == 1:
            other = next(name for name in given if name not in missing)
            raise errors.InvalidConfig(f"tls.{missing[0]}", None, f"a path, with tls.{other}")
        if missing and self.client_ca is not None:
            allowed = "a path, with tls.client_ca"
            raise errors.InvalidConfig("tls.certificate", None, allowed)
        if self.administrators and self.client_ca is None:
            raise errors.InvalidConfig(
                "tls.administrators", self.administrators, "only with tls.client_ca"
            )

    @property
    def files(self) -> TlsFiles | None:
        """None: there is no TLS."""
        if self.certificate is None or self.key is None:
            return None
        return TlsFiles(self.certificate, self.key, self.client_ca, ca_field="tls.client_ca")


@dataclass(frozen=True)
class CpuConfig:
    """The arena."""

    memory_size_gb: Annotated[
        float | None,
        Flag(
            "Size of the arena, 10^9 bytes; at most what there is.",
            between(ARENA_BYTES_MIN / GB, 1e6),
            shown="a quarter of available memory",
            example="500",
        ),
    ] = None
    numa: Annotated[
        str,
        Flag(
            "NUMA nodes of the arena; the daemon runs there too.",
            matching(NUMA, "interleave, local, or nodes such as 0,2 or 0-1"),
        ),
    ] = "interleave"

    def __post_init__(self) -> None:
        if self.memory_size_gb is None:
            share = machine.available_memory_bytes() * ARENA_SHARE / GB
            object.__setattr__(self, "memory_size_gb", max(share, ARENA_BYTES_MIN / GB))
        check(self, "cpu")

    @property
    def memory_bytes(self) -> int:
        assert self.memory_size_gb is not None
        return round(self.memory_size_gb * GB) // ALIGNMENT * ALIGNMENT

    @classmethod
    def of_bytes(cls, memory_bytes: int) -> CpuConfig:
        return cls(memory_size_gb=memory_bytes / GB)


@dataclass(frozen=True)
class DiskConfig:
    """Slab files and catalogue. Without a path there is no disk tier."""

    path: Annotated[
        Path | None,
        Flag(
            "Folder of slab files and catalogue; made if missing.",
            shown="no disk tier",
            example="/mnt/kv",
        ),
    ] = None
    size_gb: Annotated[
        float | None,
        Flag(
            "What the disk tier may take, 10^9 bytes; at most what there is.",
            between(0.001, 1e7),
            shown="a quarter of its file system",
            example="2000",
        ),
    ] = None
    durability: Annotated[
        Durability,
        Flag(
            "durable: each batch is synced before its records are committed. relaxed: only a flush "
            "syncs, so that a power cut may cost what came since, as misses."
        ),
    ] = "durable"
    admission: Annotated[
        DiskAdmission,
        Flag(
            "second_access: a block is copied to disk only once a request has matched it after the "
            "one that committed it."
        ),
    ] = "always"
    scrub_mb_per_s: Annotated[
        int,
        Flag(
            "Verify all blocks at this rate, 10^6 bytes/s, after the start and a day after each "
            "pass; 0: only when asked (kvc2 scrub).",
            between(0, 1_000_000),
        ),
    ] = 0

    def __post_init__(self) -> None:
        check(self, "disk")
        if self.path is None:
            if self.size_gb is not None:
                raise errors.InvalidConfig("disk.size_gb", self.size_gb, "only with disk.path")
        elif self.size_gb is None:
            object.__setattr__(self, "size_gb", _file_system_bytes(self.path) * DISK_SHARE / GB)
            check(self, "disk")

    @property
    def size_bytes(self) -> int:
        return 0 if self.size_gb is None else round(self.size_gb * GB) // ALIGNMENT * ALIGNMENT

    @classmethod
    def of_bytes(
        cls,
        path: Path,
        size_bytes: int,
        durability: Durability = "durable",
        admission: DiskAdmission = "always",
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
    """The engine's page and chunk size, where a file shared with it names them."""

    page_size: Annotated[
        int | None,
        Flag("Refuse engines with another page size, tokens.", power_of_two(512), shown="any"),
    ] = None
    chunk_size: Annotated[
        int | None,
        Flag(
            "The engine's prefill chunk, tokens; only checked.",
            at_least(1),
            shown="any",
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self, "attn")
        if self.chunk_size is not None and self.chunk_size % (self.page_size or 1):
            allowed = "a multiple of attn.page_size"
            raise errors.InvalidConfig("attn.chunk_size", self.chunk_size, allowed)


Rate = between(0, 1e9)


@dataclass(frozen=True)
class LimitsConfig:
    """What one daemon takes on; a call beyond one is refused with the limit's name."""

    max_sessions: Annotated[int, Flag("Engines at a time.", between(1, 4096))] = 64
    max_namespaces: Annotated[
        int, Flag("Namespaces that a session opens.", between(1, 1 << 20))
    ] = 1024
    max_known_namespaces: Annotated[
        int,
        Flag("Namespaces of all sessions since the start, and on disk.", between(1, 1 << 24)),
    ] = 1 << 16
    max_layouts: Annotated[
        int, Flag("Page layouts of all sessions since the start, and on disk.", between(1, 4096))
    ] = 64
    max_dead_blocks: Annotated[
        int, Flag("Dead blocks that explain remembers; 32 bytes each.", between(0, 1 << 28))
    ] = 1 << 16
    max_leases: Annotated[int, Flag("Open leases of a session.", between(1, 1 << 20))] = 4096
    max_leases_per_call: Annotated[
        int, Flag("Leases in one commit or release.", between(1, 1 << 16))
    ] = 1024
    max_tokens: Annotated[int, Flag("Tokens of a prompt.", between(1, 1 << 24))] = 1 << 20
    max_pool_pages: Annotated[int, Flag("Pages of an engine's pool.", between(1, 1 << 31))] = (
        1 << 24
    )
    max_grant_pages: Annotated[int, Flag("Pages of one grant.", between(1, 1 << 24))] = 1 << 16
    max_keys: Annotated[int, Flag("Opaque keys of one call.", between(1, 1 << 20))] = 4096
    max_streams: Annotated[
        int, Flag("Reads and writes of a session at a time.", between(1, 32))
    ] = 8
    max_calls_per_s: Annotated[
        int,
        Flag("Calls of a tenant in a second, of its sessions and others; 0: no limit.", Rate),
    ] = 0
    max_mb_per_s: Annotated[
        float,
        Flag("What a tenant's Read, Write and Commit bring, 10^6 bytes/s; 0: no limit.", Rate),
    ] = 0.0
    hard_pin_percent: Annotated[
        int, Flag("Percent of a tier that hard pins may keep from eviction.", between(0, 90))
    ] = 25
    soft_pin_percent: Annotated[
        int,
        Flag(
            "Percent of a tier that soft pins of one tenant may have dropped last.", between(0, 100)
        ),
    ] = 50

    def __post_init__(self) -> None:
        check(self, "limits")

    @property
    def message_bytes(self) -> int:
        """The largest message, both ways: a prompt's tokens and as many page ids, or a stream's
        1 MiB, and room."""
        return 8 * self.max_tokens + (1 << 20) + 4096


@dataclass(frozen=True)
class KvEventsConfig:
    """What routers are told: which blocks are in which tier, in vLLM's schema."""

    listen: Annotated[
        str | None,
        Flag(
            "unix:PATH of a ZeroMQ PUB socket; PATH.replay answers requests for replay. Events "
            "tell prompts' tokens: both sockets are their owner's alone. Needs the extra `events`.",
            shown="off",
        ),
    ] = None
    topic: Annotated[str, Flag("Topic of each message.", matching(r"[!-~]{0,256}", TOPICS))] = ""
    salted: Annotated[
        bool,
        Flag(
            "The first block of a path names its namespace, kvc2-HEX, where vLLM names a request's "
            "cache_salt. Without it a router can't tell models and tenants apart."
        ),
    ] = True
    buffer_mb: Annotated[
        int,
        Flag(
            "Changes that wait to be sent, and those sent that are kept for replay, each at most "
            "so much, 10^6 bytes.",
            between(1, 100_000),
        ),
    ] = 64

    def __post_init__(self) -> None:
        check(self, "kv_events")
        if self.listen is None:
            return
        with refused_as("kv_events.listen", self.listen):
            most = SOCKET_PATH_BYTES_MAX - len(REPLAY_ENDING)
            address = Address.parse(self.listen, field="kv_events.listen", path_bytes_max=most)
        if address.path is None:
            allowed = "unix:PATH: events tell tokens, and TCP doesn't say who listens"
            raise errors.InvalidConfig("kv_events.listen", self.listen, allowed)

    @property
    def path(self) -> Path | None:
        return None if self.listen is None else Address.parse(self.listen).path

    @property
    def buffer_bytes(self) -> int:
        """0: nothing is told."""
        return 0 if self.listen is None else self.buffer_mb * 1_000_000


@dataclass(frozen=True)
class RemoteConfig:
    """The store below the disk, which other hosts share."""

    url: Annotated[
        str | None,
        Flag(
            "Valkey or Redis: redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], rediss://... with "
            "TLS, or unix:///PATH (the extra `remote`). Mooncake Store (the extra `mooncake`): its "
            "master, mooncake://HOST:PORT, or its own configuration, mooncake+file:///PATH or, of "
            "its variables, mooncake+env:. A bucket of S3 (the extra `s3`): s3://BUCKET[/PREFIX], "
            "where AWS_* variables say. Prompts lie there in clear. Needs disk.path, where "
            "invalidations are kept.",
            shown="no remote tier",
        ),
    ] = None
    secret_file: Annotated[
        Path | None,
        Flag(
            "Holds at least 16 bytes, readable by its owner alone, the same on all hosts that "
            "share the store: what others wrote there is not believed, nor found.",
            shown="none, and needed with a url",
        ),
    ] = None
    ca_file: Annotated[
        Path | None,
        Flag(
            "Certificates, one of which has signed that of a rediss:// or s3:// store.",
            shown="those that the system trusts",
        ),
    ] = None
    patience_ms: Annotated[
        int,
        Flag(
            "How long in all a request waits for a store that is silent; after that nobody asks it "
            "until it answers again.",
            between(1, 10_000),
        ),
    ] = 80  # a tenth of a second, with what a busy machine adds
    deadline_ms: Annotated[
        int, Flag("How long any call of the store may take, ms.", between(10, 600_000))
    ] = 2000
    queue_mb: Annotated[
        int,
        Flag(
            "Blocks that wait to be put, 10^6 bytes; what comes when so much waits is not put.",
            between(1, 1_000_000),
        ),
    ] = 1000

    def __post_init__(self) -> None:
        check(self, "remote")
        if self.url is None:
            return
        found = self.parsed_url
        if self.secret_file is None:
            raise errors.InvalidConfig("remote.secret_file", None, "a path, with remote.url")
        if self.ca_file is not None and not found.tls:
            allowed = "only with a rediss:// or s3:// URL"
            raise errors.InvalidConfig("remote.ca_file", str(self.ca_file), allowed)

    @property
    def parsed_url(self) -> AnyUrl:
        """Of `url`, which is there. Raises InvalidConfig."""
        text = self.url or ""
        with refused_as("remote.url", masked(text)):
            return parse_store(text, field="remote.url")

    @property
    def patience_s(self) -> float:
        return self.patience_ms / 1000

    @property
    def deadline_s(self) -> float:
        return self.deadline_ms / 1000

    @property
    def queue_bytes(self) -> int:
        return self.queue_mb * 1_000_000


Quota = between(0, 1e6)


@dataclass(frozen=True)
class TenantConfig:
    """A tenant, declared in the file only. `default`, who names no tenant, is the socket's owner's
    and has neither a secret nor uids here."""

    name: Annotated[
        str, Flag("Its name.", matching(r"[A-Za-z0-9_.-]{1,64}", "1 to 64 of A-Z a-z 0-9 _ . -"))
    ]
    secret_file: Annotated[
        Path | None, Flag("Holds at least 16 bytes, readable by its owner alone.")
    ] = None
    uids: Annotated[
        tuple[int, ...],
        Flag("User ids that may open its namespaces; empty: the socket's owner."),
    ] = ()
    certificate_names: Annotated[
        tuple[str, ...],
        Flag(
            "Over TLS, who has a certificate with one of these names calls for it.",
            CERTIFICATE_NAMES,
        ),
    ] = ()
    ttl_s: Annotated[
        int,
        Flag("How long after its last use a block matches; 0: for ever.", between(0, TTL_S_MAX)),
    ] = 0
    gpu_gb: Annotated[
        float, Flag("What it may take of the pools of all engines; 0: no limit.", Quota)
    ] = 0.0
    cpu_gb: Annotated[float, Flag("What it may take of the arena; 0: no limit.", Quota)] = 0.0
    disk_gb: Annotated[float, Flag("What it may take of the disk; 0: no limit.", Quota)] = 0.0
    max_blocks: Annotated[
        int, Flag("Blocks that it may have in each tier; 0: no limit.", between(0, 1 << 40))
    ] = 0

    max_calls_per_s: Annotated[
        int | None,
        Flag("Its calls in a second; 0: no limit.", Rate, shown="limits.max_calls_per_s"),
    ] = None
    max_mb_per_s: Annotated[
        float | None,
        Flag(
            "What its Read, Write and Commit bring, 10^6 bytes/s; 0: no limit.",
            Rate,
            shown="limits.max_mb_per_s",
        ),
    ] = None

    def bytes_of(self, tier: str) -> int:
        """Its quota of gpu, cpu or disk; 0: no limit."""
        return round({"gpu": self.gpu_gb, "cpu": self.cpu_gb, "disk": self.disk_gb}[tier] * GB)

    def __post_init__(self) -> None:
        check(self, "tenants")
        if self.name == DEFAULT_TENANT:
            self._check_default()
        elif self.secret_file is None:
            raise errors.InvalidConfig("tenants.secret_file", None, f"a path, for {self.name}")

    def _check_default(self) -> None:
        if self.secret_file is not None:
            path = str(self.secret_file)
            raise errors.InvalidConfig("tenants.secret_file", path, "none for default")
        if self.uids:
            raise errors.InvalidConfig("tenants.uids", self.uids, "none for default")


@dataclass(frozen=True)
class ServeConfig:
    """`kvc2 serve`, whole. Raises InvalidConfig with key, value and what is allowed."""

    listen: Annotated[
        str,
        Flag(
            "unix:PATH (~ is a home), or HOST:PORT: of a loopback address, or with TLS of any.",
            shown="$XDG_RUNTIME_DIR/kvc2/kvc2.sock",
        ),
    ] = field(default_factory=default_listen)
    metrics_port: Annotated[
        int | None,
        Flag(
            "Port of Prometheus' /metrics on 127.0.0.1; 0: any free one.",
            between(0, 65535),
            shown="off",
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        Flag(
            "YAML, readable by its owner alone: bearer token (16 to 512 of A-Z a-z 0-9 - . _ ~ + / "
            "=) to tenant, or to `administrator`, who may do what a unix socket's owner may. Each "
            "call needs one then. Read again when it changes.",
            shown="no tokens",
        ),
    ] = None
    gpu_only: Annotated[bool, Flag("No arena and no disk.")] = False
    write_policy: Annotated[
        WritePolicy,
        Flag(
            "When a committed block is copied to slower tiers. behind: soon; back: only when free "
            "pages run short; through: before the commit is answered, or after 3 s."
        ),
    ] = "behind"
    load_policy: Annotated[
        LoadPolicy,
        Flag(
            "What of a prefix is loaded. faster: not what the engine would compute sooner than it "
            "came; always: all."
        ),
    ] = "faster"
    eviction_policy: Annotated[
        EvictionPolicy,
        Flag(
            "Which blocks every tier drops first. hazard learns from the traffic how soon which "
            "kind of block comes back; the others are those of the literature, on the leaves of "
            "the tree."
        ),
    ] = "hazard"
    admission: Annotated[
        Admission,
        Flag(
            "worth: cpu and disk refuse a block that is worth less than what they would drop for "
            "it, as hazard sees it; other policies refuse nothing. always: they take every block."
        ),
    ] = "worth"
    slab_bytes: Annotated[
        int, Flag("Size of a slab, bytes.", multiple_of(ALIGNMENT, 1 << 16, 1 << 32))
    ] = 64 << 20
    low_watermark: Annotated[
        float,
        Flag(
            "With less than this share of a gpu or cpu pool free, copies that a slower tier also "
            "holds are dropped, before anybody waits for a page; 0: only when a page is needed.",
            between(0, 0.5),
        ),
    ] = 0.01  # what a 4k prompt takes of a pool of some GB; a hit rate's worth
    high_watermark: Annotated[
        float,
        Flag("Share of a pool that is free when that ends.", between(0, 0.9)),
    ] = 0.02
    copy_threads: Annotated[
        int, Flag("Threads that copy pages; 0: one a core, at most 4.", between(0, 256))
    ] = 0
    acquire_deadline_ms: Annotated[
        int, Flag("How long an acquire waits for slower tiers, ms.", between(1, 600_000))
    ] = 2000
    drain_timeout_s: Annotated[
        float, Flag("How long SIGTERM may flush, seconds.", between(0, 3600))
    ] = 30.0
    log_format: Annotated[LogFormat, Flag("Format of the lines on stderr.")] = "text"
    tls: TlsConfig = field(default_factory=TlsConfig)
    cpu: CpuConfig = field(default_factory=CpuConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)
    attn: AttnConfig = field(default_factory=AttnConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    kv_events: KvEventsConfig = field(default_factory=KvEventsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    tenants: tuple[TenantConfig, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        self._check_listen()
        if self.high_watermark < self.low_watermark:
            allowed = f"at least low_watermark, {self.low_watermark:g}"
            raise errors.InvalidConfig("high_watermark", self.high_watermark, allowed)
        if self.copy_threads == 0:
            cores = len(os.sched_getaffinity(0))
            object.__setattr__(self, "copy_threads", min(cores, 4))  # memory is full with 4
        if self.gpu_only and self.disk.path is not None:
            object.__setattr__(self, "disk", DiskConfig())
        if self.remote.url is not None and self.disk.path is None:
            allowed = "a daemon with disk.path, which keeps what was invalidated"
            raise errors.InvalidConfig("remote.url", masked(self.remote.url), allowed)
        names = [each.name for each in self.tenants]
        if len(set(names)) != len(names):
            raise errors.InvalidConfig("tenants", names, "each name once")

    def _check_listen(self) -> None:
        address = listen_address(self.listen)
        if address.path is not None and self.tls.files is not None:
            path = str(self.tls.certificate)
            raise errors.InvalidConfig("tls.certificate", path, "only with listen on HOST:PORT")
        if address.path is not None and self.token_file is not None:
            path = str(self.token_file)
            raise errors.InvalidConfig("token_file", path, "only with listen on HOST:PORT")
        if address.path is None and self.tls.files is None and not is_loopback(address.host):
            allowed = (
                "a loopback address: a public one needs TLS, by tls.certificate, tls.key and "
                "tls.client_ca or token_file"
            )
            raise errors.InvalidConfig("listen", self.listen, allowed)
        self._check_names()

    def _check_names(self) -> None:
        """Who may call over TLS is named, and nobody where there is none."""
        names = [name for each in self.tenants for name in each.certificate_names]
        asks = self.tls.client_ca is not None
        if names and not asks:
            allowed = "none without tls.client_ca"
            raise errors.InvalidConfig("tenants.certificate_names", names, allowed)
        if self.token_file is not None:
            if any(each.name == ADMINISTRATOR for each in self.tenants):
                allowed = "another name: in token_file it is no tenant's"
                raise errors.InvalidConfig("tenants.name", ADMINISTRATOR, allowed)
            return
        if self.tls.files is not None and not asks:
            allowed = "a path, with tls.certificate; or token_file: else nobody says who calls"
            raise errors.InvalidConfig("tls.client_ca", None, allowed)
        if asks and not names and not self.tls.administrators:
            allowed = "a name, here or in tenants.certificate_names: else nobody may call"
            raise errors.InvalidConfig("tls.administrators", (), allowed)

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Segment(_message.Message):
    __slots__ = ("layer", "kv", "bytes", "offset", "stride", "sharing")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    SHARING_FIELD_NUMBER: _ClassVar[int]
    layer: int
    kv: int
    bytes: int
    offset: int
    stride: int
    sharing: int
    def __init__(self, layer: _Optional[int] = ..., kv: _Optional[int] = ..., bytes: _Optional[int] = ..., offset: _Optional[int] = ..., stride: _Optional[int] = ..., sharing: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("segments", "page_size", "layout_version", "row_bytes")
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    page_size: int
    layout_version: int
    row_bytes: int
    def __init__(self, segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., page_size: _Optional[int] = ..., layout_version: _Optional[int] = ..., row_bytes: _Optional[int] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("component", "reach", "part", "parts", "memory_kind", "device", "num_pages", "memory_bytes", "layout", "kept_pages")
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    REACH_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KEPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    component: int
    reach: int
    part: int
    parts: int
    memory_kind: int
    device: str
    num_pages: int
    memory_bytes: int
    layout: Layout
    kept_pages: bytes
    def __init__(self, component: _Optional[int] = ..., reach: _Optional[int] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ..., memory_kind: _Optional[int] = ..., device: _Optional[str] = ..., num_pages: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., kept_pages: _Optional[bytes] = ...) -> None: ...

class ComponentPages(_message.Message):
    __slots__ = ("component", "pages", "offsets")
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    component: int
    pages: bytes
    offsets: bytes
    def __init__(self, component: _Optional[int] = ..., pages: _Optional[bytes] = ..., offsets: _Optional[bytes] = ...) -> None: ...

class PageCount(_message.Message):
    __slots__ = ("component", "pages")
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    component: int
    pages: int
    def __init__(self, component: _Optional[int] = ..., pages: _Optional[int] = ...) -> None: ...

class Media(_message.Message):
    __slots__ = ("first_token", "num_tokens", "digest")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    num_tokens: int
    digest: bytes
    def __init__(self, first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("hello", "heartbeat", "detach")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    detach: Detach
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., detach: _Optional[_Union[Detach, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("engine_name", "wire_version", "wire_version_min", "pools", "arena", "expiry_ms")
    ENGINE_NAME_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_MIN_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    EXPIRY_MS_FIELD_NUMBER: _ClassVar[int]
    engine_name: str
    wire_version: int
    wire_version_min: int
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    arena: bool
    expiry_ms: int
    def __init__(self, engine_name: _Optional[str] = ..., wire_version: _Optional[int] = ..., wire_version_min: _Optional[int] = ..., pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ..., arena: _Optional[bool] = ..., expiry_ms: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Detach(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("attached", "drain", "ready", "heartbeat")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    attached: Attached
    drain: DrainNotice
    ready: Ready
    heartbeat: Heartbeat
    def __init__(self, attached: _Optional[_Union[Attached, _Mapping]] = ..., drain: _Optional[_Union[DrainNotice, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("secret", "session_epoch", "nonce", "side_socket", "heartbeat_interval_ms", "expiry_ms", "wire_version", "limits")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    SESSION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIDE_SOCKET_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRY_MS_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    secret: bytes
    session_epoch: int
    nonce: bytes
    side_socket: str
    heartbeat_interval_ms: int
    expiry_ms: int
    wire_version: int
    limits: Limits
    def __init__(self, secret: _Optional[bytes] = ..., session_epoch: _Optional[int] = ..., nonce: _Optional[bytes] = ..., side_socket: _Optional[str] = ..., heartbeat_interval_ms: _Optional[int] = ..., expiry_ms: _Optional[int] = ..., wire_version: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_tokens", "max_leases", "max_namespaces", "max_leases_per_call", "max_grant_pages", "max_keys", "max_message_bytes", "acquire_deadline_ms", "max_streams")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASES_FIELD_NUMBER: _ClassVar[int]
    MAX_NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASES_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    MAX_GRANT_PAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    max_leases: int
    max_namespaces: int
    max_leases_per_call: int
    max_grant_pages: int
    max_keys: int
    max_message_bytes: int
    acquire_deadline_ms: int
    max_streams: int
    def __init__(self, max_tokens: _Optional[int] = ..., max_leases: _Optional[int] = ..., max_namespaces: _Optional[int] = ..., max_leases_per_call: _Optional[int] = ..., max_grant_pages: _Optional[int] = ..., max_keys: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., acquire_deadline_ms: _Optional[int] = ..., max_streams: _Optional[int] = ...) -> None: ...

class DrainNotice(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ready(_message.Message):
    __slots__ = ("granted", "arena_bytes")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    granted: _containers.RepeatedCompositeFieldContainer[ComponentPages]
    arena_bytes: int
    def __init__(self, granted: _Optional[_Iterable[_Union[ComponentPages, _Mapping]]] = ..., arena_bytes: _Optional[int] = ...) -> None: ...

class SessionRef(_message.Message):
    __slots__ = ("secret", "session_epoch")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    SESSION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    secret: bytes
    session_epoch: int
    def __init__(self, secret: _Optional[bytes] = ..., session_epoch: _Optional[int] = ...) -> None: ...

class OpenNamespaceRequest(_message.Message):
    __slots__ = ("session", "identity", "tenant", "salt", "ttl_s", "layout", "key_mode")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KEY_MODE_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    identity: bytes
    tenant: str
    salt: bytes
    ttl_s: int
    layout: Layout
    key_mode: int
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., identity: _Optional[bytes] = ..., tenant: _Optional[str] = ..., salt: _Optional[bytes] = ..., ttl_s: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., key_mode: _Optional[int] = ...) -> None: ...

class OpenNamespaceResponse(_message.Message):
    __slots__ = ("namespace_id",)
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    def __init__(self, namespace_id: _Optional[int] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("session", "namespace_id", "tokens", "keys", "extras")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    namespace_id: int
    tokens: bytes
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    extras: _containers.RepeatedCompositeFieldContainer[Media]
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., namespace_id: _Optional[int] = ..., tokens: _Optional[bytes] = ..., keys: _Optional[_Iterable[bytes]] = ..., extras: _Optional[_Iterable[_Union[Media, _Mapping]]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("session", "request_id", "tokens", "key", "namespace_id", "extras", "namespace")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    request_id: bytes
    tokens: bytes
    key: bytes
    namespace_id: int
    extras: _containers.RepeatedCompositeFieldContainer[Media]
    namespace: bytes
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., request_id: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., key: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., extras: _Optional[_Iterable[_Union[Media, _Mapping]]] = ..., namespace: _Optional[bytes] = ...) -> None: ...

class TierBlocks(_message.Message):
    __slots__ = ("tier", "blocks")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    blocks: int
    def __init__(self, tier: _Optional[str] = ..., blocks: _Optional[int] = ...) -> None: ...

class DifferingField(_message.Message):
    __slots__ = ("name", "ours", "theirs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OURS_FIELD_NUMBER: _ClassVar[int]
    THEIRS_FIELD_NUMBER: _ClassVar[int]
    name: str
    ours: str
    theirs: str
    def __init__(self, name: _Optional[str] = ..., ours: _Optional[str] = ..., theirs: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("page_size", "tokens", "hit_blocks", "runs", "why", "cause", "tier", "policy", "died_s_ago", "sibling", "sibling_equal", "other", "namespace", "asked_s_ago", "uptime_s", "dead_known", "dead_forgotten", "worth", "victim_worth")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    DIED_S_AGO_FIELD_NUMBER: _ClassVar[int]
    SIBLING_FIELD_NUMBER: _ClassVar[int]
    SIBLING_EQUAL_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ASKED_S_AGO_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    DEAD_KNOWN_FIELD_NUMBER: _ClassVar[int]
    DEAD_FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    WORTH_FIELD_NUMBER: _ClassVar[int]
    VICTIM_WORTH_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    tokens: int
    hit_blocks: int
    runs: _containers.RepeatedCompositeFieldContainer[TierBlocks]
    why: str
    cause: str
    tier: str
    policy: str
    died_s_ago: float
    sibling: bytes
    sibling_equal: int
    other: OtherNamespace
    namespace: bytes
    asked_s_ago: float
    uptime_s: float
    dead_known: int
    dead_forgotten: int
    worth: float
    victim_worth: float
    def __init__(self, page_size: _Optional[int] = ..., tokens: _Optional[int] = ..., hit_blocks: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[TierBlocks, _Mapping]]] = ..., why: _Optional[str] = ..., cause: _Optional[str] = ..., tier: _Optional[str] = ..., policy: _Optional[str] = ..., died_s_ago: _Optional[float] = ..., sibling: _Optional[bytes] = ..., sibling_equal: _Optional[int] = ..., other: _Optional[_Union[OtherNamespace, _Mapping]] = ..., namespace: _Optional[bytes] = ..., asked_s_ago: _Optional[float] = ..., uptime_s: _Optional[float] = ..., dead_known: _Optional[int] = ..., dead_forgotten: _Optional[int] = ..., worth: _Optional[float] = ..., victim_worth: _Optional[float] = ...) -> None: ...

class OtherNamespace(_message.Message):
    __slots__ = ("namespace", "hit_tokens", "fields")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    hit_tokens: int
    fields: _containers.RepeatedCompositeFieldContainer[DifferingField]
    def __init__(self, namespace: _Optional[bytes] = ..., hit_tokens: _Optional[int] = ..., fields: _Optional[_Iterable[_Union[DifferingField, _Mapping]]] = ...) -> None: ...

class TierTokens(_message.Message):
    __slots__ = ("gpu", "cpu", "disk", "remote")
    GPU_FIELD_NUMBER: _ClassVar[int]
    CPU_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    gpu: int
    cpu: int
    disk: int
    remote: int
    def __init__(self, gpu: _Optional[int] = ..., cpu: _Optional[int] = ..., disk: _Optional[int] = ..., remote: _Optional[int] = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("matched_tokens", "tiers", "found")
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    matched_tokens: int
    tiers: TierTokens
    found: bytes
    def __init__(self, matched_tokens: _Optional[int] = ..., tiers: _Optional[_Union[TierTokens, _Mapping]] = ..., found: _Optional[bytes] = ...) -> None: ...

class Hints(_message.Message):
    __slots__ = ("session_end", "expect_return_within_s", "priority", "ttl_s")
    SESSION_END_FIELD_NUMBER: _ClassVar[int]
    EXPECT_RETURN_WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    session_end: bool
    expect_return_within_s: int
    priority: int
    ttl_s: int
    def __init__(self, session_end: _Optional[bool] = ..., expect_return_within_s: _Optional[int] = ..., priority: _Optional[int] = ..., ttl_s: _Optional[int] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("session", "namespace_id", "request_id", "tokens", "deadline_ms", "hints", "extras", "keys", "place", "skip_blocks", "at_once", "poll", "grants")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    SKIP_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    POLL_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    namespace_id: int
    request_id: bytes
    tokens: bytes
    deadline_ms: int
    hints: Hints
    extras: _containers.RepeatedCompositeFieldContainer[Media]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    place: int
    skip_blocks: int
    at_once: bool
    poll: int
    grants: _containers.RepeatedCompositeFieldContainer[PageCount]
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., namespace_id: _Optional[int] = ..., request_id: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ..., hints: _Optional[_Union[Hints, _Mapping]] = ..., extras: _Optional[_Iterable[_Union[Media, _Mapping]]] = ..., keys: _Optional[_Iterable[bytes]] = ..., place: _Optional[int] = ..., skip_blocks: _Optional[int] = ..., at_once: _Optional[bool] = ..., poll: _Optional[int] = ..., grants: _Optional[_Iterable[_Union[PageCount, _Mapping]]] = ...) -> None: ...

class AcquireResponse(_message.Message):
    __slots__ = ("matched_tokens", "tiers", "transfer", "computing_tokens", "held", "granted", "first_block", "found", "coming_blocks", "expected_ms")
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    COMING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    matched_tokens: int
    tiers: TierTokens
    transfer: int
    computing_tokens: int
    held: _containers.RepeatedCompositeFieldContainer[ComponentPages]
    granted: _containers.RepeatedCompositeFieldContainer[ComponentPages]
    first_block: int
    found: bytes
    coming_blocks: int
    expected_ms: int
    def __init__(self, matched_tokens: _Optional[int] = ..., tiers: _Optional[_Union[TierTokens, _Mapping]] = ..., transfer: _Optional[int] = ..., computing_tokens: _Optional[int] = ..., held: _Optional[_Iterable[_Union[ComponentPages, _Mapping]]] = ..., granted: _Optional[_Iterable[_Union[ComponentPages, _Mapping]]] = ..., first_block: _Optional[int] = ..., found: _Optional[bytes] = ..., coming_blocks: _Optional[int] = ..., expected_ms: _Optional[int] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("session", "grants")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    grants: _containers.RepeatedCompositeFieldContainer[PageCount]
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., grants: _Optional[_Iterable[_Union[PageCount, _Mapping]]] = ...) -> None: ...

class GrantResponse(_message.Message):
    __slots__ = ("granted",)
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    granted: _containers.RepeatedCompositeFieldContainer[ComponentPages]
    def __init__(self, granted: _Optional[_Iterable[_Union[ComponentPages, _Mapping]]] = ...) -> None: ...

class LeaseCommit(_message.Message):
    __slots__ = ("request_id", "first_block", "tokens", "namespace_id", "keys", "pages", "extras")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    first_block: int
    tokens: bytes
    namespace_id: int
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    pages: _containers.RepeatedCompositeFieldContainer[ComponentPages]
    extras: _containers.RepeatedCompositeFieldContainer[Media]
    def __init__(self, request_id: _Optional[bytes] = ..., first_block: _Optional[int] = ..., tokens: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., keys: _Optional[_Iterable[bytes]] = ..., pages: _Optional[_Iterable[_Union[ComponentPages, _Mapping]]] = ..., extras: _Optional[_Iterable[_Union[Media, _Mapping]]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session", "leases", "durable", "prefill_tokens_per_s", "copied", "grants")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    leases: _containers.RepeatedCompositeFieldContainer[LeaseCommit]
    durable: bool
    prefill_tokens_per_s: float
    copied: bool
    grants: _containers.RepeatedCompositeFieldContainer[PageCount]
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., leases: _Optional[_Iterable[_Union[LeaseCommit, _Mapping]]] = ..., durable: _Optional[bool] = ..., prefill_tokens_per_s: _Optional[float] = ..., copied: _Optional[bool] = ..., grants: _Optional[_Iterable[_Union[PageCount, _Mapping]]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("results", "durable", "granted")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedScalarFieldContainer[bytes]
    durable: bool
    granted: _containers.RepeatedCompositeFieldContainer[ComponentPages]
    def __init__(self, results: _Optional[_Iterable[bytes]] = ..., durable: _Optional[bool] = ..., granted: _Optional[_Iterable[_Union[ComponentPages, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session", "request_ids", "hints", "returned", "grants")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    request_ids: _containers.RepeatedScalarFieldContainer[bytes]
    hints: _containers.RepeatedCompositeFieldContainer[Hints]
    returned: _containers.RepeatedCompositeFieldContainer[ComponentPages]
    grants: _containers.RepeatedCompositeFieldContainer[PageCount]
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., request_ids: _Optional[_Iterable[bytes]] = ..., hints: _Optional[_Iterable[_Union[Hints, _Mapping]]] = ..., returned: _Optional[_Iterable[_Union[ComponentPages, _Mapping]]] = ..., grants: _Optional[_Iterable[_Union[PageCount, _Mapping]]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("granted",)
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    granted: _containers.RepeatedCompositeFieldContainer[ComponentPages]
    def __init__(self, granted: _Optional[_Iterable[_Union[ComponentPages, _Mapping]]] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("durable_blocks", "not_durable_blocks")
    class NotDurableBlocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    DURABLE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NOT_DURABLE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    durable_blocks: int
    not_durable_blocks: _containers.ScalarMap[str, int]
    def __init__(self, durable_blocks: _Optional[int] = ..., not_durable_blocks: _Optional[_Mapping[str, int]] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("tier", "blocks")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    blocks: int
    def __init__(self, tier: _Optional[str] = ..., blocks: _Optional[int] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("evicted_blocks", "last_copies")
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAST_COPIES_FIELD_NUMBER: _ClassVar[int]
    evicted_blocks: int
    last_copies: int
    def __init__(self, evicted_blocks: _Optional[int] = ..., last_copies: _Optional[int] = ...) -> None: ...

class InvalidateRequest(_message.Message):
    __slots__ = ("weights_digest", "namespace", "namespace_id", "session")
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    weights_digest: str
    namespace: bytes
    namespace_id: int
    session: SessionRef
    def __init__(self, weights_digest: _Optional[str] = ..., namespace: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., session: _Optional[_Union[SessionRef, _Mapping]] = ...) -> None: ...

class InvalidateResponse(_message.Message):
    __slots__ = ("namespaces", "blocks", "durable")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    namespaces: int
    blocks: int
    durable: bool
    def __init__(self, namespaces: _Optional[int] = ..., blocks: _Optional[int] = ..., durable: _Optional[bool] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("session", "namespace_id", "namespace", "tokens", "tier", "hard", "ttl_s", "keys", "extras", "keep_stronger")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    HARD_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    KEEP_STRONGER_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    namespace_id: int
    namespace: bytes
    tokens: bytes
    tier: str
    hard: bool
    ttl_s: int
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    extras: _containers.RepeatedCompositeFieldContainer[Media]
    keep_stronger: bool
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., namespace_id: _Optional[int] = ..., namespace: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., tier: _Optional[str] = ..., hard: _Optional[bool] = ..., ttl_s: _Optional[int] = ..., keys: _Optional[_Iterable[bytes]] = ..., extras: _Optional[_Iterable[_Union[Media, _Mapping]]] = ..., keep_stronger: _Optional[bool] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("blocks", "resident_blocks", "pinned_blocks", "pinned")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    resident_blocks: int
    pinned_blocks: int
    pinned: bytes
    def __init__(self, blocks: _Optional[int] = ..., resident_blocks: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., pinned: _Optional[bytes] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("session", "namespace_id", "namespace", "tokens", "tier", "keys", "extras")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    namespace_id: int
    namespace: bytes
    tokens: bytes
    tier: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    extras: _containers.RepeatedCompositeFieldContainer[Media]
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., namespace_id: _Optional[int] = ..., namespace: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., tier: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ..., extras: _Optional[_Iterable[_Union[Media, _Mapping]]] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class SetQuotaRequest(_message.Message):
    __slots__ = ("tenant", "tier", "max_bytes", "max_blocks")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    tier: str
    max_bytes: int
    max_blocks: int
    def __init__(self, tenant: _Optional[str] = ..., tier: _Optional[str] = ..., max_bytes: _Optional[int] = ..., max_blocks: _Optional[int] = ...) -> None: ...

class SetQuotaResponse(_message.Message):
    __slots__ = ("use",)
    USE_FIELD_NUMBER: _ClassVar[int]
    use: TenantUse
    def __init__(self, use: _Optional[_Union[TenantUse, _Mapping]] = ...) -> None: ...

class TenantUse(_message.Message):
    __slots__ = ("tenant", "tier", "bytes", "blocks", "max_bytes", "max_blocks")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    tier: str
    bytes: int
    blocks: int
    max_bytes: int
    max_blocks: int
    def __init__(self, tenant: _Optional[str] = ..., tier: _Optional[str] = ..., bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., max_bytes: _Optional[int] = ..., max_blocks: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("session", "namespace_id", "namespace", "tokens", "tier", "deadline_ms", "keys", "extras")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    namespace_id: int
    namespace: bytes
    tokens: bytes
    tier: str
    deadline_ms: int
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    extras: _containers.RepeatedCompositeFieldContainer[Media]
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., namespace_id: _Optional[int] = ..., namespace: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., tier: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., keys: _Optional[_Iterable[bytes]] = ..., extras: _Optional[_Iterable[_Union[Media, _Mapping]]] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("tiers", "coming_tokens")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COMING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tiers: TierTokens
    coming_tokens: int
    def __init__(self, tiers: _Optional[_Union[TierTokens, _Mapping]] = ..., coming_tokens: _Optional[int] = ...) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ("start_mb_per_s", "stop")
    START_MB_PER_S_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start_mb_per_s: int
    stop: bool
    def __init__(self, start_mb_per_s: _Optional[int] = ..., stop: _Optional[bool] = ...) -> None: ...

class ScrubResponse(_message.Message):
    __slots__ = ("running", "mb_per_s", "total_blocks", "verified_blocks", "verified_bytes", "bad_blocks", "seconds", "passes")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    MB_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BAD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    running: bool
    mb_per_s: int
    total_blocks: int
    verified_blocks: int
    verified_bytes: int
    bad_blocks: int
    seconds: float
    passes: int
    def __init__(self, running: _Optional[bool] = ..., mb_per_s: _Optional[int] = ..., total_blocks: _Optional[int] = ..., verified_blocks: _Optional[int] = ..., verified_bytes: _Optional[int] = ..., bad_blocks: _Optional[int] = ..., seconds: _Optional[float] = ..., passes: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "capacity_bytes", "pages", "free_pages", "private_pages", "resident_pages", "in_flight_pages", "pinned_pages")
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_PAGES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_PAGES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_PAGES_FIELD_NUMBER: _ClassVar[int]
    PINNED_PAGES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    capacity_bytes: int
    pages: int
    free_pages: int
    private_pages: int
    resident_pages: int
    in_flight_pages: int
    pinned_pages: int
    def __init__(self, tier: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., pages: _Optional[int] = ..., free_pages: _Optional[int] = ..., private_pages: _Optional[int] = ..., resident_pages: _Optional[int] = ..., in_flight_pages: _Optional[int] = ..., pinned_pages: _Optional[int] = ...) -> None: ...

class LayoutSlabs(_message.Message):
    __slots__ = ("layout", "tier", "engines", "page_size", "page_bytes", "slab_bytes", "slabs", "pages", "resident_pages")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLABS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_PAGES_FIELD_NUMBER: _ClassVar[int]
    layout: bytes
    tier: str
    engines: _containers.RepeatedScalarFieldContainer[str]
    page_size: int
    page_bytes: int
    slab_bytes: int
    slabs: int
    pages: int
    resident_pages: int
    def __init__(self, layout: _Optional[bytes] = ..., tier: _Optional[str] = ..., engines: _Optional[_Iterable[str]] = ..., page_size: _Optional[int] = ..., page_bytes: _Optional[int] = ..., slab_bytes: _Optional[int] = ..., slabs: _Optional[int] = ..., pages: _Optional[int] = ..., resident_pages: _Optional[int] = ...) -> None: ...

class HitRates(_message.Message):
    __slots__ = ("real", "estimated")
    REAL_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    real: float
    estimated: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, real: _Optional[float] = ..., estimated: _Optional[_Iterable[float]] = ...) -> None: ...

class SessionStats(_message.Message):
    __slots__ = ("session_epoch", "engine_name", "pid", "leases", "seconds", "pool", "prefill_tokens_per_s")
    SESSION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ENGINE_NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    session_epoch: int
    engine_name: str
    pid: int
    leases: int
    seconds: float
    pool: TierStats
    prefill_tokens_per_s: float
    def __init__(self, session_epoch: _Optional[int] = ..., engine_name: _Optional[str] = ..., pid: _Optional[int] = ..., leases: _Optional[int] = ..., seconds: _Optional[float] = ..., pool: _Optional[_Union[TierStats, _Mapping]] = ..., prefill_tokens_per_s: _Optional[float] = ...) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("version", "instance", "uptime_s", "tiers", "sessions", "blocks", "holes", "leases", "namespaces", "metadata_bytes", "counters", "hit_rates", "hit_rate_unlimited", "tenants", "slabs")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class HitRatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: HitRates
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[HitRates, _Mapping]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOLES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    METADATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    HIT_RATES_FIELD_NUMBER: _ClassVar[int]
    HIT_RATE_UNLIMITED_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    SLABS_FIELD_NUMBER: _ClassVar[int]
    version: str
    instance: bytes
    uptime_s: float
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStats]
    blocks: int
    holes: int
    leases: int
    namespaces: int
    metadata_bytes: int
    counters: _containers.ScalarMap[str, float]
    hit_rates: _containers.MessageMap[str, HitRates]
    hit_rate_unlimited: float
    tenants: _containers.RepeatedCompositeFieldContainer[TenantUse]
    slabs: _containers.RepeatedCompositeFieldContainer[LayoutSlabs]
    def __init__(self, version: _Optional[str] = ..., instance: _Optional[bytes] = ..., uptime_s: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., sessions: _Optional[_Iterable[_Union[SessionStats, _Mapping]]] = ..., blocks: _Optional[int] = ..., holes: _Optional[int] = ..., leases: _Optional[int] = ..., namespaces: _Optional[int] = ..., metadata_bytes: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ..., hit_rates: _Optional[_Mapping[str, HitRates]] = ..., hit_rate_unlimited: _Optional[float] = ..., tenants: _Optional[_Iterable[_Union[TenantUse, _Mapping]]] = ..., slabs: _Optional[_Iterable[_Union[LayoutSlabs, _Mapping]]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("flushed",)
    FLUSHED_FIELD_NUMBER: _ClassVar[int]
    flushed: FlushResponse
    def __init__(self, flushed: _Optional[_Union[FlushResponse, _Mapping]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("session", "request_id", "first_block", "blocks")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    request_id: bytes
    first_block: int
    blocks: int
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., request_id: _Optional[bytes] = ..., first_block: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("block", "offset", "payload", "checksum")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    block: int
    offset: int
    payload: bytes
    checksum: bytes
    def __init__(self, block: _Optional[int] = ..., offset: _Optional[int] = ..., payload: _Optional[bytes] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("session", "commit", "block", "offset", "payload", "checksum")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    commit: LeaseCommit
    block: int
    offset: int
    payload: bytes
    checksum: bytes
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., commit: _Optional[_Union[LeaseCommit, _Mapping]] = ..., block: _Optional[int] = ..., offset: _Optional[int] = ..., payload: _Optional[bytes] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: bytes
    def __init__(self, results: _Optional[bytes] = ...) -> None: ...

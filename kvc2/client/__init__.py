"""What an engine carries of kvc2: see README.md for what lies where."""

from kvc2.answers import (
    Acquired,
    Asked,
    Committed,
    DaemonStats,
    Evicted,
    Explained,
    Flushed,
    Hints,
    Invalidated,
    LayoutSlabs,
    LeaseCommit,
    Matched,
    Media,
    Prefetched,
    PrefixPinned,
    Released,
    Scrubbed,
    SessionStats,
    TenantUse,
    TierStats,
    TierTokens,
)
from kvc2.client.admin import Admin
from kvc2.client.bridge import Bridge, Daemon, PrefixLostError, open_bridge
from kvc2.client.calls import BridgeConfig, SoftPin
from kvc2.client.client import ArenaTerms, Client
from kvc2.client.completions import Completions
from kvc2.client.connection import NamespaceHandle, SessionOptions
from kvc2.client.counters import Counters
from kvc2.client.memory import ArenaView, EngineMemory, PoolMemory
from kvc2.client.objects import Objects, open_objects
from kvc2.client.pages import PageBook
from kvc2.client.sessions import Lease
from kvc2.client.share import Share, SharedPool
from kvc2.client.streams import Streams
from kvc2.errors import Detached

__all__ = [
    "Acquired",
    "Admin",
    "ArenaTerms",
    "ArenaView",
    "Asked",
    "Bridge",
    "BridgeConfig",
    "Client",
    "Committed",
    "Completions",
    "Counters",
    "Daemon",
    "DaemonStats",
    "Detached",
    "EngineMemory",
    "Evicted",
    "Explained",
    "Flushed",
    "Hints",
    "Invalidated",
    "LayoutSlabs",
    "Lease",
    "LeaseCommit",
    "Matched",
    "Media",
    "NamespaceHandle",
    "Objects",
    "PageBook",
    "PoolMemory",
    "Prefetched",
    "PrefixLostError",
    "PrefixPinned",
    "Released",
    "Scrubbed",
    "SessionOptions",
    "SessionStats",
    "Share",
    "SharedPool",
    "SoftPin",
    "Streams",
    "TenantUse",
    "TierStats",
    "TierTokens",
    "open_bridge",
    "open_objects",
]

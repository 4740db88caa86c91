"""What an engine carries of kvc2: see README.md for what lies where."""

from kvc2.answers import (
    Acquired,
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
from kvc2.client.client import Client
from kvc2.client.connection import NamespaceHandle
from kvc2.client.memory import PoolMemory
from kvc2.errors import Detached

__all__ = [
    "Acquired",
    "Admin",
    "Client",
    "Committed",
    "DaemonStats",
    "Detached",
    "Evicted",
    "Explained",
    "Flushed",
    "Hints",
    "Invalidated",
    "LayoutSlabs",
    "LeaseCommit",
    "Matched",
    "NamespaceHandle",
    "PoolMemory",
    "Prefetched",
    "PrefixPinned",
    "Released",
    "Scrubbed",
    "SessionStats",
    "TenantUse",
    "TierStats",
    "TierTokens",
]

"""Which version of an engine is here, and whether it is one that our tests drive."""

from __future__ import annotations

import importlib.metadata
import logging
from contextlib import suppress

log = logging.getLogger(__name__)


def version_of(*distributions: str) -> str | None:
    """Of the first that is installed; some engines are published under several names."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def check(engine: str, tried: str, *distributions: str) -> None:
    """Says so in the log where it isn't `tried`, as 0.5: another one's interface may have moved."""
    found = version_of(*distributions)
    if found is None:
        log.warning("kvc2: tried with %s %s; this one doesn't say which it is", engine, tried)
    elif not found.startswith(f"{tried}."):
        log.warning("kvc2: tried with %s %s, not with %s", engine, tried, found)

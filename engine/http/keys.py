"""API keys by tenant, read again when their file changes, so that none needs a restart.

Not responsible for who may ask what (service).
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.settings import read_api_keys
from kvc2.errors import InvalidConfig

log = logging.getLogger(__name__)

LOOK_S = 1.0  # how often the file is looked at, while requests come


class Keys:
    """The tenants of API keys. Threads may share it."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        """Keys that never change; none: no key is needed."""
        self._tenants = dict(tenants)

    @property
    def needed(self) -> bool:
        return bool(self._tenants)

    def tenant(self, key: str) -> str | None:
        """None: the key is unknown. Takes the same time for any that is."""
        found = [
            tenant
            for known, tenant in self._tenants.items()
            if hmac.compare_digest(known.encode(), key.encode())
        ]
        return found[0] if found else None


class FileKeys(Keys):
    """Those of a YAML file, as they are in it now. A file that can't be read keeps the last ones.
    Raises InvalidConfig if it can't be read at first."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(read_api_keys(path))
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = self._stamped()
        self._looked = clock()

    def tenant(self, key: str) -> str | None:
        self._look()
        return super().tenant(key)

    def _stamped(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _look(self) -> None:
        with self._lock:
            now = self._clock()
            if now - self._looked < LOOK_S:
                return
            self._looked = now
            stamp = self._stamped()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._tenants = read_api_keys(self._path)
            except InvalidConfig as error:
                log.warning("the API keys stay as they were: %s", error)
            else:
                log.info("the API keys were read again: %d", len(self._tenants))

"""Whose a shown secret is: an API key, a bearer token. From a YAML file of secret to owner, which
is read again when it changes, so that none needs a restart.

Secrets are kept as digests, and no error quotes one. Not here: what an owner may do.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvc2 import flags
from kvc2.errors import InvalidConfig
from kvc2.host.private_file import read_file

LOOK_S = 1.0  # how often the file is looked at, while secrets are shown


class Keyring:
    """Owners by secret. Threads may share it."""

    def __init__(self, owners: Mapping[str, str]) -> None:
        """Secrets that never change; none: none is needed."""
        self._owners = _digested(owners)

    @property
    def needed(self) -> bool:
        return bool(self._owners)

    def owner(self, shown: str) -> str | None:
        """None: the secret is unknown. Takes the same time for any that is."""
        digest = _digest(shown)
        found = [
            owner for known, owner in self._owners.items() if hmac.compare_digest(known, digest)
        ]
        return found[0] if found else None


@dataclass(frozen=True)
class KeyringSource:
    """`field`: the path's name in errors. `private`: a file that others may read is refused.
    `check` raises InvalidConfig, which quotes no secret, for owners by secret that can't be.
    `told` hears how many secrets there are when they have changed, or why they did not."""

    field: str
    path: Path
    private: bool
    check: Callable[[Mapping[str, str]], None]
    told: Callable[[int | InvalidConfig], None]


class KeyringFile(Keyring):
    """Those of a file, as they are in it now. A file that can't be used keeps the last ones. Raises
    InvalidConfig if it can't be used at first."""

    def __init__(self, source: KeyringSource, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        content = self._content()
        super().__init__(self._parsed(content))
        self._seen = hashlib.sha256(content).digest()
        self._refused = ""
        self._clock = clock
        self._lock = threading.Lock()
        self._looked = clock()

    def owner(self, shown: str) -> str | None:
        self._look()
        return super().owner(shown)

    def _look(self) -> None:
        with self._lock:
            now = self._clock()
            if now - self._looked < LOOK_S:
                return
            self._looked = now
            try:
                self._read_again()
            except InvalidConfig as error:
                if str(error) != self._refused:
                    self._source.told(error)
                self._refused = str(error)
            else:
                self._refused = ""

    def _read_again(self) -> None:
        content = self._content()
        digest = hashlib.sha256(content).digest()
        if digest == self._seen:
            return
        self._owners = _digested(self._parsed(content))
        self._seen = digest
        self._source.told(len(self._owners))

    def _content(self) -> bytes:
        source = self._source
        with flags.refused_as(source.field, str(source.path)):
            return read_file(source.field, source.path, private=source.private)

    def _parsed(self, content: bytes) -> dict[str, str]:
        field, shown = self._source.field, str(self._source.path)
        found = flags.parse(field, content, shown=shown)
        if not all(each and isinstance(found[each], str) for each in found):
            raise InvalidConfig(field, shown, "a mapping to owners' names, both as strings")
        if not found:
            raise InvalidConfig(field, shown, "holds nothing, so that nobody could call")
        self._source.check(found)
        return found


def _digested(owners: Mapping[str, str]) -> dict[bytes, str]:
    return {_digest(secret): owner for secret, owner in owners.items()}


def _digest(secret: str) -> bytes:
    """Of the same length for all, so that a comparison doesn't tell theirs."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()

"""API keys by tenant, of the file that --api-keys names.

Not responsible for who may ask what (service), nor for keys that change (kvc2/keyring.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kvc2.errors import InvalidConfig
from kvc2.keyring import KeyringFile, KeyringSource

log = logging.getLogger(__name__)


def file_keys(path: Path, clock: Callable[[], float] = time.monotonic) -> KeyringFile:
    """API key -> tenant, as a YAML file has them now. Raises InvalidConfig."""
    source = KeyringSource("api_keys", path, private=False, check=_any, told=_told)
    return KeyringFile(source, clock)


def _any(_: Mapping[str, str]) -> None:
    """Each key and each tenant may be: the daemon knows whose is whose."""


def _told(news: int | InvalidConfig) -> None:
    if isinstance(news, InvalidConfig):
        log.warning("the API keys stay as they were: %s", news)
    else:
        log.info("the API keys were read again: %d", news)

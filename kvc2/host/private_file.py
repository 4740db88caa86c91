"""Small files as a configuration names them, secrets among them: those are their owner's alone.

Not here: what a file holds.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvc2 import errors

FILE_BYTES_MAX = 1 << 20


def read_file(field: str, path: Path, *, private: bool) -> bytes:
    """All of it. Raises InvalidRequest of `field` for what can't be read, for more than
    FILE_BYTES_MAX, and where it is `private` for what others may read."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        allowed = f"a readable file: {error.strerror}"
        raise errors.InvalidRequest(field, str(path), allowed) from error
    if private and stat.S_IMODE(facts.st_mode) & 0o077:
        raise errors.InvalidRequest(field, str(path), "mode 0600: others may read it")
    if len(content) > FILE_BYTES_MAX:
        raise errors.InvalidRequest(field, str(path), f"at most {FILE_BYTES_MAX} bytes")
    return content

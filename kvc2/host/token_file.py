"""The bearer token that a client shows, from a file, so that no command line has it.

Not here: on which calls it goes (client/channel.py), and whose it is (server/credentials.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvc2 import errors
from kvc2.host.file_stamp import Stamp
from kvc2.host.private_file import read_file

FIELD = "token_file"
VISIBLE = re.compile(r"[!-~]+")  # what a header can carry


class TokenFile:
    """The token of one file, as it is there now; replace the file to show another. Threads may
    share it. Raises InvalidRequest if it can't be used at first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: Stamp | None = None  # of the file that the token is of, once it is settled
        self._token = self._read()

    def headers(self) -> tuple[tuple[str, str], ...]:
        """For each call's metadata. A file that can't be used keeps the last token."""
        try:
            stamp = Stamp.at(self._path)
            if stamp != self._kept:
                self._token = self._read()
                self._kept = stamp if stamp.settled else None
        except (OSError, errors.InvalidRequest):
            self._kept = None  # it is being replaced: the next call looks again
        return (("authorization", f"Bearer {self._token}"),)

    def _read(self) -> str:
        """No error quotes it."""
        content = read_file(FIELD, self._path, private=True)
        token = content.decode(errors="replace").strip()
        if VISIBLE.fullmatch(token) is None:
            allowed = "one bearer token in it, of visible ASCII characters"
            raise errors.InvalidRequest(FIELD, os.fspath(self._path), allowed)
        return token

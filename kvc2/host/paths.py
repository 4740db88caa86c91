"""Paths as users write them: in a flag, in a configuration file, in an address."""

from __future__ import annotations

import os
from pathlib import Path

from kvc2 import errors


def user_path(field: str, text: str | Path, *, shown: str = "", allowed: str = "a path") -> Path:
    """The absolute path that was meant: a leading ~ or ~USER is a home, all else means itself. The
    error quotes `shown`, or the text. Raises InvalidRequest."""
    given = str(text)
    if not given or "\0" in given:
        raise errors.InvalidRequest(field, shown or given, allowed)
    expanded = os.path.expanduser(given)  # not pathlib's, to which ./~ is ~
    if given.startswith("~") and expanded == given:
        home = given.partition("/")[0]
        raise errors.InvalidRequest(
            field, shown or given, f"{allowed}; {home} names no home here (a file: from the root)"
        )
    return Path(expanded).absolute()

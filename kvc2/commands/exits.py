"""How commands end: 0 done, 1 failed, 2 bad usage."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

from kvc2 import errors

FAILED, BAD_USAGE = 1, 2


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Expected errors as one line on stderr and an exit code; others keep their traceback."""
    try:
        yield
    except (errors.InvalidConfig, errors.InvalidRequest) as error:
        print(f"kvc2: {error}", file=sys.stderr)
        raise typer.Exit(BAD_USAGE) from error
    except errors.Kvc2Error as error:
        print(f"kvc2: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error

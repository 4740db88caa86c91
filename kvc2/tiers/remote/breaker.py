"""When a remote store is left alone, and when it is tried again.

Pure: the caller says what happened, and asks. Not here: the calls (link.py).
"""

from __future__ import annotations

REST_S = 0.5  # before the first try; twice as long after each one that fails ...
REST_S_MAX = 30.0  # ... up to here: so long a store that is back may go unused


class Breaker:
    """
    | state  | to     | when [function]                                                       |
    |--------|--------|-----------------------------------------------------------------------|
    | open   | closed | a ping was answered [mended], or a call that was late was [worked]     |
    | closed | open   | a call failed, or is late: nobody asks any more [failed]               |
    | open   | open   | a ping failed: the next one comes after twice as long [failed]         |

    It begins open, so that a store that is dead from the start costs no request anything. A store
    that answers pings and nothing else is tried ever more seldom too: only a call that worked makes
    the rest short again."""

    def __init__(self) -> None:
        self.closed = False
        self.rest_s = 0.0  # from being opened until the next ping

    def failed(self) -> None:
        self.closed = False
        self.rest_s = min(max(REST_S, 2 * self.rest_s), REST_S_MAX)

    def mended(self) -> None:
        self.closed = True

    def worked(self) -> None:
        self.closed, self.rest_s = True, 0.0

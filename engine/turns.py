"""Whose turn it is among tenants: the one that was served least, by tokens.

A counter of tokens for each tenant ("Fairness in Serving Large Language Models", OSDI 2024): what
is computed for a tenant is added to its own, and the least of those that want something goes next.
A tenant that comes back from rest begins CREDIT below the least of the others: what it asks for at
first goes before a flood, and rest earns no more than that. Within a tenant it is first come, first
served. Not responsible for places and pages (admission, scheduler).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from engine.sequence import Sequence as Request

CREDIT = 4096  # tokens: a long prompt's


class Turns:
    """The counters. One thread calls all of it."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}

    def wants(self, tenants: Iterable[str]) -> None:
        """Those that have requests now. Others are forgotten."""
        wanting = set(tenants)
        known = {name: count for name, count in self._served.items() if name in wanting}
        begin = min(known.values(), default=CREDIT) - CREDIT
        self._served = dict.fromkeys(wanting, begin) | known

    def computed(self, tenant: str, tokens: int) -> None:
        """So many tokens were computed for it."""
        if tenant in self._served:
            self._served[tenant] += tokens

    def sorted(self, requests: Sequence[Request], running: Collection[Request]) -> list[Request]:
        """By the tenants' turns, then by arrival; of two as much served, the one with fewer that
        run goes first."""
        runs = Counter(each.tenant for each in running)

        def place(each: Request) -> tuple[int, int, int]:
            return self._served.get(each.tenant, 0), runs[each.tenant], each.order

        return sorted(requests, key=place)

    def yielding(self, waiting: Sequence[Request], running: Collection[Request]) -> list[Request]:
        """Who of the `running` ones gives its place up, where all are taken: the youngest of the
        tenant with the most, for a tenant that waits and has none. Maybe nobody."""
        runs = Counter(each.tenant for each in running)
        if not runs or all(runs[each.tenant] for each in waiting):
            return []
        tenant, most = runs.most_common(1)[0]
        if most < 2:  # there are as many tenants as places
            return []
        mine = [each for each in running if each.tenant == tenant]
        return [max(mine, key=lambda each: each.order)]

"""The oracle's part about lives: who has said what of which block, what is dead, and why."""

import math
from dataclasses import replace

from kvc2._core import Cause
from tests.oracles.model_parts import Hints, Life, Path


class LivesModel:
    def __init__(self) -> None:
        self.stamps: dict[Path, int] = {}  # of present blocks and of holes
        self.retired: dict[int, int] = {}  # namespaces, and when
        self.lives: dict[Path, Life] = {}  # of the same blocks as stamps, where not Life()
        self.now = 0  # seconds
        self.prefix_pins: dict[tuple[int, Path], bool] = {}  # (pool, prefix) -> hard
        self.pin_ends: dict[tuple[int, Path], int] = {}  # the second, of those that have one

    def dead(self, path: Path) -> bool:
        return path[0] in self.retired or self.life(path).expires <= self.now

    def cause_of_end(self, path: Path) -> Cause:
        return Cause.INVALIDATED if path[0] in self.retired else Cause.EXPIRED

    def pinned(self, path: Path, pool: int, *, hard: bool) -> bool:
        return any(
            at == pool and prefix[: len(path)] == path and how == hard
            for (at, prefix), how in self.prefix_pins.items()
        )

    def pinned_paths(self, pool: int, *, hard: bool) -> set[Path]:
        pins = [p for (at, p), how in self.prefix_pins.items() if at == pool and how == hard]
        return {prefix[:n] for prefix in pins for n in range(2, len(prefix) + 1)}

    def pin(
        self,
        pool: int,
        prefix: Path,
        *,
        hard: bool,
        most: int,
        ttl: int = 0,
        keep_stronger: bool = False,
    ) -> bool:
        known = self.prefix_pins.get((pool, prefix))
        if keep_stronger and known is not None:
            end = self.pin_ends.get((pool, prefix), math.inf)
            if (known, end) >= (hard, self.now + ttl if ttl else math.inf):
                return True
        before = dict(self.prefix_pins)
        self.prefix_pins[pool, prefix] = hard
        fits = prefix[0] not in self.retired and len(self.pinned_paths(pool, hard=hard)) <= most
        self.prefix_pins = self.prefix_pins if fits else before
        if fits:
            self.pin_ends[pool, prefix] = self.now + ttl
            if not ttl:
                del self.pin_ends[pool, prefix]
        return fits

    def unpin(self, pool: int, prefix: Path) -> int:
        self.pin_ends.pop((pool, prefix), None)
        return 0 if self.prefix_pins.pop((pool, prefix), None) is None else len(prefix) - 1

    def advance(self, seconds: int) -> list[tuple[int, Path]]:
        """The pins that end."""
        self.now += seconds
        over = [at for at, end in self.pin_ends.items() if end <= self.now]
        known = [at for at in over if at in self.prefix_pins]
        for at in over:
            self.unpin(*at)
        return known

    def expire_by(self, namespace: object, second: int) -> None:
        for path in [each for each in self.stamps if each[0] == namespace]:
            life = self.life(path)
            self.lives[path] = replace(life, expires=min(life.expires, second))

    def life(self, path: Path) -> Life:
        return self.lives.get(path, Life())

    def longest_unused(self, paths: list[Path]) -> list[Path]:
        """Several where one request used branches: it matched one, and computes another."""
        oldest = min((self.stamps[path] for path in paths), default=0)
        return [path for path in paths if self.stamps[path] == oldest]

    def life_of(self, hints: Hints) -> Life:
        """What a request says."""
        expires = self.now + hints.ttl if hints.ttl else Life().expires
        returns = self.now + 4 * hints.returns if hints.returns else 0
        return Life(expires, hints.priority, returns=returns)

    def say(self, hints: Hints, paths: list[Path], fresh: list[Path]) -> None:
        """A request that uses these blocks says it of each."""
        said = self.life_of(hints)
        for path in paths:
            known = Life(0) if path in fresh else self.life(path)
            priority = max(known.priority, said.priority)
            expires = max(known.expires, said.expires)
            self.lives[path] = Life(expires, priority, returns=said.returns)

    def end(self, path: Path) -> None:
        """A session that is over was the last to use it."""
        self.lives[path] = replace(self.life(path), ended=True)

    def retire(self, namespace: int) -> int:
        fresh = namespace not in self.retired
        self.retired.setdefault(namespace, self.now)
        for pool, prefix in [at for at in self.prefix_pins if at[1][0] == namespace]:
            del self.prefix_pins[pool, prefix]
        return sum(path[0] == namespace for path in self.stamps) if fresh else 0

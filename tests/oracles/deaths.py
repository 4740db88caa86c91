"""Why a prefix is not there: the oracle of Index.explain, and the machine that asks it.

The oracle keeps every death and says which of them the index must still know; whatever it explains
it scans for. It is asked after every step, of living prompts and dead ones, each going on with a
block that nobody has.
"""

from dataclasses import dataclass

from hypothesis.stateful import invariant

from kvc2._core import Cause, Explanation, Why
from tests.oracles.blocks import PAGE_SIZE, Prompt, extras_of, tokens_of
from tests.oracles.endings import IndexEndings
from tests.oracles.machines import DEAD_BLOCKS, SEEN
from tests.oracles.model_parts import NO_HINTS, Death, Hints, Path
from tests.oracles.models import IndexModel

STRANGER = (7, 0)  # a block that no prompt has, but that begins like one


@dataclass(frozen=True)
class Explained:
    tiers: list[int]  # by leading block
    why: Why
    death: Death | None = None
    siblings: frozenset[Path] = frozenset()


def explain(model: IndexModel, namespace: int, pools: list[int], blocks: Prompt) -> Explained:
    tiers = model.tiers(namespace, pools, blocks)
    if len(tiers) == len(blocks):
        return Explained(tiers, Why.NOTHING)
    path: Path = (namespace, *blocks[: len(tiers) + 1])
    holders = [i for i, pool in sorted(model.pools.items()) if pool.present(path)]
    if holders and model.dead(path):
        cause = model.cause_of_end(path)
        when = model.life(path).expires if cause == Cause.EXPIRED else model.retired[namespace]
        ended = Death(path, cause, holders[0], when)
        return Explained(tiers, Why.DIED, ended)
    if any(model.pools[i].resident(path) for i in holders):
        return Explained(tiers, Why.ELSEWHERE)
    if holders:
        return Explained(tiers, Why.ARRIVING)
    known = [death for death in model.deaths[-DEAD_BLOCKS:] if death.path == path]
    death = known[-1] if known else None
    if model.under(path):
        return Explained(tiers, Why.HOLE, death)
    residents = {p for at in model.pools.values() for p in at.blocks if at.resident(p)}
    siblings = frozenset(p for p in residents if p[:-1] == path[:-1] and not model.dead(p))
    why = Why.DIED if death else Why.DIVERGED if siblings else Why.NEVER_SEEN
    return Explained(tiers, why, death, siblings)


def common(one: object, two: object) -> int:
    """Leading tokens that are the same; all of them where extras differ."""
    same = [a == b for a, b in zip(one[:PAGE_SIZE], two[:PAGE_SIZE], strict=True)]  # type: ignore[index]
    return same.index(False) if False in same else len(same)


class IndexDeaths(IndexEndings):
    """The machine with time, and with a look at the dead after each step."""

    @invariant()
    def explanations_agree(self) -> None:
        paths = {path for at in self.model.pools.values() for path in at.blocks}
        paths |= {death.path for death in self.model.deaths[-2 * DEAD_BLOCKS :]}
        for namespace, *blocks in self.of_tokens(paths):
            for pools in (*map(self.model.chain, self.gpus), sorted(self.model.pools)):
                prompt: Prompt = [*blocks, STRANGER]  # type: ignore[list-item]
                self.check_prompt(namespace, pools, prompt)  # type: ignore[arg-type]
        counts = self.index.counts()
        deaths = len(self.model.deaths)
        assert (counts.deaths, counts.dead_known) == (deaths, min(deaths, DEAD_BLOCKS))

    def check_prompt(self, namespace: int, pools: list[int], prompt: Prompt) -> None:
        real = self.index.explain(namespace, pools, tokens_of(prompt), extras_of(prompt))
        self.check_explained(real, explain(self.model, namespace, pools, prompt), prompt)

    def check_explained(self, real: Explanation, expected: Explained, prompt: Prompt) -> None:
        runs = [tier for tier, blocks in real.runs.tolist() for _ in range(blocks)]
        assert (real.blocks, runs) == (len(expected.tiers), expected.tiers)
        assert real.why == expected.why
        SEEN[f"explain: {expected.why.name}"] += 1
        assert (real.death is None) == (expected.death is None)
        if real.death is not None and expected.death is not None:
            got = (real.death.cause, real.death.pool, real.death.when)
            assert got == (expected.death.cause, expected.death.pool, expected.death.when)
            assert (real.death.worth, real.death.victim_worth) == expected.death.worths
            SEEN[f"explain: {expected.death.cause.name}"] += 1
        assert (real.sibling is None) == (not expected.siblings)
        if real.sibling is not None:
            block = prompt[len(expected.tiers)]
            tokens = tuple(real.sibling.tokens.tolist())
            assert tokens in {path[-1][:PAGE_SIZE] for path in expected.siblings}  # type: ignore[index]
            assert real.sibling.common == common(tokens, block)
            assert real.sibling.common == max(common(p[-1], block) for p in expected.siblings)
            SEEN["explain: a sibling with other extras"] += real.sibling.common == PAGE_SIZE
            SEEN["explain: the sibling that is most like it"] += len(expected.siblings) > 1

    def open(
        self,
        namespace: int,
        pool: int,
        prompt: Prompt,
        limit: int,
        hints: Hints = NO_HINTS,
        *,
        skip: int = 0,
        touches: bool = True,
    ) -> int:
        """Acquire explains what it found before it changed anything; meanwhile time goes on."""
        self.model.advance(limit % 3)
        self.index.advance(self.model.now)
        lease = super().open(namespace, pool, prompt, limit, hints, skip=skip, touches=touches)
        blocks = prompt[:limit]
        space = self.model.leases[lease].namespace  # another one, if this was invalidated
        expected = explain(self.model, space, self.model.chain(pool), blocks)
        self.check_explained(self.opened.explanation, expected, blocks)
        return lease

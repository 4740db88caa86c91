"""The index's machine with prefetches: what is brought nearer before anybody leases it."""

from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import rule

from kvc2 import _core
from tests.oracles.blocks import Prompt, extras_of, tokens_of
from tests.oracles.machines import SEEN, choice, namespaces, prompts
from tests.oracles.model_parts import TransferModel
from tests.oracles.slab_machine import SlabMachine
from tests.oracles.slab_models import SlabModel


class PrefetchModel(SlabModel):
    """The oracle's part about prefetches."""

    def touch(self, namespace: int, pool: int, blocks: Prompt) -> None:
        self.clock += 1
        for i in range(len(self.tiers(namespace, self.chain(pool), blocks))):
            self.stamps[namespace, *blocks[: i + 1]] = self.clock

    def prefetch(
        self,
        namespace: int,
        pool: int,
        blocks: Prompt,
        count: int,
        came: tuple[int | None, list[int]],
    ) -> TransferModel | int | None:
        """A transfer (`came`: its id and pages), or the id of the one to wait for."""
        transfer, source, chain = came[0], deque(came[1]), self.chain(pool)
        plan = TransferModel(-1, -1, [], [], [])
        for i in range(len(self.tiers(namespace, chain, blocks))):
            path = (namespace, *blocks[: i + 1])
            there = self.pools[pool].present(path)
            if there and not plan.paths:
                continue
            holders = [n for n, p in enumerate(chain) if self.pools[p].resident(path)]
            if there or not holders:
                break
            way = (chain[holders[0]], chain[holders[0] - 1])
            target = self.pools[way[1]]
            if target.present(path):
                if plan.paths:
                    break
                page = target.blocks[path]
                return next(
                    i for i, t in self.transfers.items()
                    if t.target == way[1] and not t.is_move and page in t.target_pages
                )  # fmt: skip
            if not plan.paths:
                plan = TransferModel(*way, [], [], [])
            if way != (plan.source, plan.target) or target.closed or len(plan.paths) == count:
                break
            if not self.offer(plan, path, source):
                break
        assert not source, "more pages than there are"
        return self.start(plan, transfer)


class PrefetchMachine(SlabMachine):
    """Towards any pool, for any prompt."""

    model: PrefetchModel

    def __init__(self) -> None:
        super().__init__()
        self.model = PrefetchModel(self.policy)

    @rule(namespace=namespaces, pool=choice, prompt=prompts, count=st.integers(1, 4),
          touches=st.booleans(), lands=st.booleans())  # fmt: skip
    def prefetch(
        self, namespace: int, pool: int, prompt: Prompt, count: int, touches: bool, lands: bool
    ) -> None:
        at, space = [*self.gpus, self.cpu][pool % 3], self.current[namespace]
        near = self.model.pools[at].blocks
        known = [path for p in self.model.pools.values() for path in p.blocks if path not in near]
        there = self.of_tokens(known)
        if there and count > 1:  # a walk seldom names what it has
            space, *blocks = there[pool % len(there)]  # type: ignore[assignment]
            prompt = list(blocks)  # type: ignore[arg-type]
        transfer = self.bring(space, at, prompt, count, touches=touches)
        if transfer is not None and lands:
            self.land(transfer)
        self.bring(space, at, prompt, count, touches=False)

    def bring(
        self, space: int, at: int, prompt: Prompt, count: int, *, touches: bool
    ) -> int | None:
        """The transfer that has begun."""
        real = self.index.prefetch(
            space, at, tokens_of(prompt), count, touches=touches, extras=extras_of(prompt)
        )
        if touches:
            self.model.touch(space, at, prompt)
        if isinstance(real, _core.Wait):
            self.tell([])
            assert self.model.prefetch(space, at, prompt, count, (None, [])) == real.transfer
            SEEN["prefetch: wait"] += 1
            return None
        pages = [] if real is None else real.target_pages.tolist()
        self.tell(pages)
        came = (None if real is None else real.id, pages)
        expected = self.model.prefetch(space, at, prompt, count, came)
        assert not isinstance(expected, int), f"did not wait for {expected}"
        self.check_transfer(real, expected)
        if real is None:
            return None
        SEEN[f"prefetch: from tier {self.model.pools[real.source].tier}"] += 1
        return real.id

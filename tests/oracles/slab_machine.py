"""The index's machine with rules for slabs: closed, emptied by moves, taken or reopened."""

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from kvc2 import _core
from tests.oracles.machines import SEEN, IndexMachine, choice
from tests.oracles.model_parts import TransferModel

NO_SLAB = 0xFFFFFFFF
slabs = st.integers(0, 4)


class SlabMachine(IndexMachine):
    """Slabs of any pool, at any time."""

    @rule(pool=choice, slab=slabs)
    def take_slab(self, pool: int, slab: int) -> None:
        at = self.a_pool(pool)
        shut = slab in self.model.pools[at].shut
        fine = self.model.take_slab(at, slab)
        assert self.index.take_slab(at, slab) == fine
        SEEN["free -> absent: take_slab"] += fine
        SEEN["take_slab: a closed one"] += fine and shut

    @rule(pool=choice, slab=slabs)
    def close_slab(self, pool: int, slab: int) -> None:
        at = self.a_pool(pool)
        there = slab in self.model.pools[at].numbers()
        fine = self.model.close_slab(at, slab)
        assert self.index.close_slab(at, slab) == fine
        SEEN["free -> absent: close_slab"] += fine
        SEEN["close_slab: refused"] += there and not fine

    @rule(pool=choice)
    def reopen_slab(self, pool: int) -> None:
        at = self.a_pool(pool)
        slab = min(self.model.pools[at].shut, default=0)
        fine = self.model.reopen_slab(at, slab)
        assert self.index.reopen_slab(at, slab) == fine
        SEEN["absent -> free: reopen_slab"] += fine

    @rule(pool=choice, slab=slabs, count=st.integers(1, 4))
    def plan_move(self, pool: int, slab: int, count: int) -> None:
        at = self.a_pool(pool)
        real = self.index.plan_move(at, slab, count)
        pages = [] if real is None else real.target_pages.tolist()
        transfer = None if real is None else real.id
        expected = self.model.plan_move(at, slab, count, transfer, pages)
        assert (real is None) == (expected is None)
        if real is not None and expected is not None:
            self.check_move(real, expected)

    def check_move(self, real: "_core.Transfer", expected: TransferModel) -> None:
        self.last_transfer += 1
        assert (real.id, real.source, real.target) == (
            self.last_transfer, expected.source, expected.target
        )  # fmt: skip
        assert real.source_pages.tolist() == expected.source_pages
        SEEN["free -> private: plan_move"] += 1
        assert (real.records is not None) == (real.target == self.disk)
        if real.target == self.disk:
            for source, target in zip(expected.source_pages, expected.target_pages, strict=True):
                self.generations[target] = self.generations[source]
            self.check_records(real, expected)

    def land(self, transfer: int, short: int = 0) -> None:
        plan = self.model.transfers[transfer]
        if plan.is_move:
            self.land_move(transfer, max(len(plan.paths) - short, 0))
        else:
            super().land(transfer, short)

    def land_move(self, transfer: int, done: int) -> None:
        plan = self.model.transfers[transfer]
        queued = {p for at in self.model.pools.values() for p in at.queue}
        left = self.index.complete(transfer, done).tolist()
        assert left == self.model.complete_move(transfer, done)
        alive = plan.source in self.model.pools
        SEEN["resident -> free: a move"] += bool(left)
        SEEN["move: only in part"] += alive and 0 < len(left) < len(plan.paths)
        SEEN["move: a block was pinned meanwhile"] += alive and not plan.failed and len(left) < done
        SEEN["move: of a removed pool"] += not alive
        SEEN["move: the rest has failed"] += alive and done < len(plan.paths)
        SEEN["move: what is still to be demoted"] += bool(queued.intersection(left))

    @invariant()
    def slabs_agree(self) -> None:
        for pool, at in self.model.pools.items():
            assert self.index.pool_counts(pool).slabs == len(at.numbers())
            held = self.index.slab_pages(pool).tolist()
            open_slabs = {n: count for n, count in enumerate(held) if count != NO_SLAB}
            assert open_slabs == self.model.slab_pages(pool)

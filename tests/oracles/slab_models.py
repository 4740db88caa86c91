"""The naive oracle of slabs that come, are emptied, and go to another pool."""

from tests.oracles.demotion_models import DemotionModel
from tests.oracles.model_parts import FREE, PRIVATE, RESIDENT, TransferModel


class SlabModel(DemotionModel):
    """DemotionModel, and what is done with whole slabs."""

    def close_slab(self, pool: int, slab: int) -> bool:
        at = self.pools[pool]
        busy = any(at.state[page] == PRIVATE or self.pins(pool, page) for page in at.slab(slab))
        if slab not in at.numbers() - at.shut or busy:
            return False
        at.shut.add(slab)
        for page in at.slab(slab):
            if at.state[page] == FREE:
                at.free(page)
        return True

    def reopen_slab(self, pool: int, slab: int) -> bool:
        at = self.pools[pool]
        fine = slab in at.shut
        at.shut.discard(slab)
        for page in range(slab * at.per_slab, (slab + 1) * at.per_slab) if fine else []:
            at.state.setdefault(page, FREE)
        return fine

    def take_slab(self, pool: int, slab: int) -> bool:
        at = self.pools[pool]
        if slab not in at.numbers() or any(at.state[page] != FREE for page in at.slab(slab)):
            return False
        at.shut.discard(slab)
        for page in at.slab(slab):
            del at.state[page]
        return True

    def slab_pages(self, pool: int) -> dict[int, int]:
        at = self.pools[pool]
        held = {n: [page for page in at.slab(n) if at.state[page] != FREE] for n in at.numbers()}
        return {n: len(pages) for n, pages in held.items() if n not in at.shut}

    def victim_age(self, pool: int) -> int | None:
        path = self.victim(pool)
        return None if path is None else self.clock - self.stamps[path]

    def plan_move(
        self, pool: int, slab: int, count: int, transfer: int | None, picks: list[int]
    ) -> TransferModel | None:
        at = self.pools[pool]
        plan = TransferModel(pool, pool, [], [], [])
        for page in sorted(at.slab(slab)) if slab in at.shut and not at.closed else []:
            if at.state[page] != RESIDENT or self.pins(pool, page):
                continue
            if len(plan.paths) == count or not at.free_pages():
                break
            plan.paths.append(at.owner(page))
            plan.source_pages.append(page)
            plan.target_pages.append(picks[len(plan.target_pages)])
            assert at.state[plan.target_pages[-1]] == FREE
            at.state[plan.target_pages[-1]] = PRIVATE
        return self.start(plan, transfer)

    def complete_move(self, transfer: int, done: int) -> list[int]:
        """The pages that blocks have left."""
        move = self.transfers.pop(transfer)
        done = 0 if move.failed else done
        if move.source not in self.pools:
            return []
        at = self.pools[move.source]
        left = []
        pages = zip(move.paths, move.source_pages, move.target_pages, strict=True)
        for i, (path, source, target) in enumerate(pages):
            if i >= done or self.pins(move.source, source):
                at.free(target)
                continue
            at.blocks[path] = target
            at.state[target] = RESIDENT
            if source in at.queue:
                self.enqueue(move.source, target)
            at.free(source)
            left.append(source)
        return left

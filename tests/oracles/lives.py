"""Whole lives as single rules, so that walks get deep: a prompt comes back from every tier, a
transfer fails under two leases, a page rots, a session dies with copies under way.

Every call goes through machines.py, which checks it against the oracle; here is only what follows
what. Between two calls of a rule the index proves its laws too.
"""

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.oracles.admission_machine import AdmissionMachine
from tests.oracles.blocks import Prompt
from tests.oracles.deaths import IndexDeaths
from tests.oracles.machines import (  # fmt: skip
    BLOCKS,
    PER_SLAB,
    SEEN,
    choice,
    namespaces,
    prompts,
    skips,
    some_blocks,
    some_hints,
)
from tests.oracles.model_parts import NO_HINTS, PRIVATE, Hints, Path

HOWS = [
    "load",
    "load",
    "promote",
    "promote",
    "land",
    "land",
    "fail",
    "share",
    "compute",
    "squeeze",
    "shorten",
    "shorten",
    "shorten",
]
ends = st.sampled_from(["stays", "stays", "leaves", "closes", "dies"])


class IndexLives(IndexDeaths, AdmissionMachine):
    """The machine with rules of many calls beside those of one."""

    def living(self, pick: int) -> int:
        """A pool for leases that is open; closed ones are forgotten first."""
        self.engine(0)
        return self.a_head(pick)

    def engine(self, pick: int) -> int:
        """An engine's pool that is open; closed ones are forgotten."""
        while any(self.model.pools[gpu].closed for gpu in self.gpus):
            self.session_is_forgotten()
        return self.a_gpu(pick)

    def compute(self, lease: int) -> None:
        """Commits what the lease has no page for, as far as pages can be had."""
        at = self.model.leases[lease]
        blocks = list(at.path[at.end + 1 :])
        self.grant(at.pool, len(blocks))
        pages = [
            page
            for page in self.some(at.pool, PRIVATE, len(at.path) + 9, 0)
            if not self.model.is_held(at.pool, page)
        ][: len(blocks)]
        self.check_commit(lease, at.end, blocks[: len(pages)], pages)  # type: ignore[arg-type]
        self.index.check()

    def arrive(self, short: int = 0) -> None:
        """The newest transfer ends, if it is under way."""
        if self.last_transfer in self.model.transfers:
            self.land(self.last_transfer, short)
            self.index.check()

    def calm(self) -> None:
        """Nothing is pinned any more."""
        for lease in list(self.model.leases):
            self.release(lease)
        for transfer in list(self.model.transfers):
            self.land(transfer)

    def demote_all(self, count: int, *, to_disk: bool, short: int = 0) -> None:
        """Write-behind, as far as there is room."""
        for pool in [*self.gpus, self.cpu][: 3 if to_disk else 2]:
            self.plan_demote(pool, count)
            self.arrive(short)

    def known(self, pick: int) -> Path:
        """A path that some pool has the last block of."""
        there = {p for at in self.model.pools.values() for p in at.blocks}
        paths = sorted(self.of_tokens(there) or [(0, BLOCKS[0])], key=repr)
        return paths[pick % len(paths)]

    @rule(
        namespace=namespaces, gpu=choice, prompt=prompts, stays=st.integers(0, 2),
        hints=st.one_of(st.just(NO_HINTS), some_hints), seconds=st.integers(0, 3), skip=skips,
    )  # fmt: skip
    def serve(
        self,
        namespace: int,
        gpu: int,
        prompt: Prompt,
        stays: int,
        hints: Hints,
        seconds: int,
        skip: int,
    ) -> None:
        """A request from acquire to release, all transfers well."""
        lease = self.open(namespace, self.living(gpu), prompt, len(prompt), hints, skip=skip)
        for _ in range(2):
            self.next_load(lease, 3)
            self.arrive()
            self.promote(lease)
            self.arrive()
        self.compute(lease)
        if stays != 1:
            self.release(lease)
            self.advance(seconds)

    @rule(gpu=choice, prompt=prompts)
    def serve_twins(self, gpu: int, prompt: Prompt) -> None:
        """Two requests compute the same blocks at once."""
        pool = self.living(gpu)
        for lease in [self.open(0, pool, prompt, 9) for _ in range(2)]:
            self.compute(lease)

    @rule(count=st.integers(1, 6), to_disk=st.booleans())
    def write_behind(self, count: int, to_disk: bool) -> None:
        self.demote_all(count, to_disk=to_disk, short=int(to_disk and count > 4))  # some are short
        for pool in [*self.gpus, self.cpu]:  # the watermarks
            self.keep_free(pool, count)

    @precondition(lambda self: any(at.blocks for at in self.model.pools.values()))
    @rule(
        gpu=choice, known=choice, own=st.lists(some_blocks, max_size=2),
        calm=st.booleans(), deep=st.booleans(),
        hows=st.lists(st.sampled_from(HOWS), min_size=2, max_size=7), end=ends, skip=skips,
    )  # fmt: skip
    def bring_back(
        self,
        gpu: int,
        known: int,
        own: Prompt,
        calm: bool,
        deep: bool,
        hows: list[str],
        end: str,
        skip: int,
    ) -> None:
        """A prompt that only slower pools hold; its transfers may stay under way."""
        pool = self.living(gpu)
        if not any(at.blocks for at in self.model.pools.values()):
            return  # only a session that is forgotten now had some
        namespace, *blocks = self.known(known)
        if calm:
            self.calm()
        self.demote_all(9, to_disk=True)
        for each in [*self.gpus, self.cpu][: 3 if deep else 2]:
            self.evict(each, 9)
        prompt = [*blocks, *own]
        lease = self.open(namespace, pool, prompt, 9, skip=skip)  # type: ignore[arg-type]
        for how in hows:
            self.live(lease, how, prompt)  # type: ignore[arg-type]
        if end == "leaves":
            self.release(lease)
        elif end != "stays" and pool in self.gpus:
            self.promote(lease)
            self.close(pool)
            self.plan_demote(pool, 9)
            if end == "dies":
                self.session_is_forgotten()

    def live(self, lease: int, how: str, prompt: Prompt) -> None:
        """One thing that happens while the lease is open."""
        at = self.model.leases[lease]
        if how == "load":
            self.next_load(lease, 3)
        elif how == "promote":
            self.promote(lease)
        elif how == "land":
            self.arrive()
        elif how == "fail":
            self.arrive(short=2)
        elif how == "compute":
            self.compute(lease)
        elif how == "shorten":
            self.shorten(lease, at.end + 1)
            if max(self.model.leases) == lease:  # and so does a twin
                self.shorten(self.open(at.namespace, at.pool, prompt, 9), len(at.found))
        elif how == "squeeze":
            self.evict(at.pool, 9)
            self.evict(self.cpu, 2)
        elif max(self.model.leases) == lease:
            self.promote(lease)
            twin = self.open(at.namespace, at.pool, prompt, 9)
            self.promote(twin)
            self.next_load(twin, 3)
        self.index.check()

    @precondition(lambda self: self.model.leases)
    @rule(lease=choice, blocks=st.integers(0, 4))
    def less_is_brought(self, lease: int, blocks: int) -> None:
        """A lease gives up on the rest of its prefix, and computes it."""
        self.shorten(self.a_lease(lease), blocks)

    def shorten(self, lease: int, blocks: int) -> None:
        at = self.model.leases[lease]
        matched = len(at.found)
        self.index.shorten(lease, blocks)
        self.model.shorten(lease, blocks)
        SEEN["shorten: a lease brings less"] += len(at.found) < matched
        SEEN["shorten: another computes what it would have brought"] += (
            len(at.found) < matched and at.computing > 0
        )

    @precondition(lambda self: any(at.blocks for at in self.model.pools.values()))
    @rule(gpu=choice, known=choice, goes=st.booleans())
    def the_caller_has_it_all(self, gpu: int, known: int, goes: bool) -> None:
        """A request skips all that is there, which may go meanwhile, and goes on from it."""
        pool = self.living(gpu)
        self.calm()
        if not any(at.blocks for at in self.model.pools.values()):
            return
        namespace, *blocks = self.known(known)
        prompt = [*blocks, BLOCKS[0]]
        lease = self.open(namespace, pool, prompt, 9, skip=len(blocks))  # type: ignore[arg-type]
        for each in [*self.gpus, self.cpu, self.disk] if goes else []:
            self.evict(each, 9)
        self.compute(lease)

    @rule(gpu=choice, prompt=prompts)
    def a_copy_goes_too_early(self, gpu: int, prompt: Prompt) -> None:
        """The cpu's pool evicts it before the disk has it, while the engine's still does."""
        pool = self.engine(gpu)
        self.calm()
        self.compute(self.open(0, pool, prompt, 9))
        self.calm()
        for _ in range(2):
            self.plan_demote(pool, 9)
            self.arrive()
            self.evict(self.cpu, 9)

    @rule(gpu=choice, prompt=prompts, short=st.integers(0, 2), leaves=st.booleans())
    def compute_what_arrives(self, gpu: int, prompt: Prompt, short: int, leaves: bool) -> None:
        """A request computes what was not cached when it began, and is being promoted by now."""
        pool = self.living(gpu)
        other = next(each for each in self.gpus if each != pool)
        self.calm()
        self.evict(pool, 9)
        mine, theirs = self.open(0, pool, prompt, 9), self.open(0, other, prompt, 9)
        self.compute(theirs)
        self.demote_all(9, to_disk=False)
        third = self.open(0, pool, prompt, 9)
        self.promote(third)
        self.compute(mine)
        if leaves:
            self.release(mine)
        self.arrive(short)

    @precondition(
        lambda self: any(len(p) > 2 for at in self.model.pools.values() for p in at.blocks)
    )
    @rule(pick=choice, own=st.lists(some_blocks, max_size=1),
          then=st.sampled_from(["", "again", "death"]))  # fmt: skip
    def a_block_rots(self, pick: int, own: Prompt, then: str) -> None:
        """A block above others is lost in all pools, or in all but an engine's that dies then."""
        self.calm()
        below = sorted(
            {p for at in self.model.pools.values() for p in at.blocks if len(p) > 2}, key=repr
        )
        if not below:  # they were on their way, and failed
            return
        path = below[pick % len(below)]
        top = path[: 2 + pick % (len(path) - 2)]
        for pool, at in self.model.pools.items():
            if at.present(top) and not (then == "death" and pool in self.gpus):
                self.lost(pool, [at.blocks[top]])
        self.index.check()
        if then == "death":
            for gpu in list(self.gpus):
                self.close(gpu)
                self.session_is_forgotten()
        elif then:
            namespace, *blocks = path
            prompt = [*blocks, *own]
            self.compute(self.open(namespace, self.living(pick), prompt, 9))  # type: ignore[arg-type]

    @rule(
        pool=choice, pick=choice, meanwhile=st.sampled_from(["rest", "use", "die"]),
        short=st.integers(0, 2),
    )  # fmt: skip
    def a_slab_moves_away(self, pool: int, pick: int, meanwhile: str, short: int) -> None:
        """The coldest blocks of the pool go, what the slab holds moves to others, it is taken."""
        at = self.a_pool(pool)
        if meanwhile == "die":  # the session that has most
            self.calm()
            at = max(self.gpus, key=lambda gpu: len(self.model.pools[gpu].blocks))
        slabs = sorted({page // PER_SLAB for page in self.model.pools[at].blocks.values()})
        if not slabs:
            return
        slab = slabs[pick % len(slabs)]
        self.add_slab(at)
        self.close_slab(at, slab)
        held = self.model.pools[at].slab(slab)
        self.evict(at, max(0, len(held) - len(self.model.pools[at].free_pages())))
        before = self.last_transfer
        self.plan_move(at, slab, 9)
        if self.last_transfer > before:
            move = self.last_transfer
            self.while_it_moves(at, meanwhile)
            self.land(move, short)
        if at in self.model.pools:
            self.take_slab(at, slab)
        self.index.check()

    def while_it_moves(self, pool: int, what: str) -> None:
        if what == "use":  # its first block, which is pinned thereby
            namespace, *blocks = self.model.transfers[self.last_transfer].paths[0]
            gpu = pool if pool in self.gpus else self.engine(pool)
            self.evict(gpu, 9)
            lease = self.open(namespace, gpu, blocks, 9)  # type: ignore[arg-type]
            if pool == self.disk:
                self.evict(self.cpu, 9)
                self.next_load(lease, 3)
            self.promote(lease)
        elif what == "die":
            self.close(pool)
            self.session_is_forgotten()

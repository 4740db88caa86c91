"""Rules for how blocks' lives end before eviction comes to them: a namespace is
invalidated, a fault takes a page.

The machine of machines.py with these verbs beside its own.
"""

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.machines import PAGE_SIZE, PER_SLAB, SEEN, IndexMachine, choice, small, u32


class IndexEndings(IndexMachine):
    """Verbs that kill blocks, and the one that buries them."""

    @rule(
        which=st.integers(0, 1), rarely=st.sampled_from([False] * 5 + [True]), buried=st.booleans()
    )
    def retire(self, which: int, rarely: bool, buried: bool) -> None:
        """A namespace is invalidated; another comes in its place."""
        if not rarely:
            return
        old = self.current[which]
        assert self.index.retire(old) == self.model.retire(old)
        assert self.index.retire(old) == 0
        leases = [le for le in self.model.leases.values() if le.path[0] == old]
        SEEN["retire: an open lease"] += any(le.held for le in leases)
        self.names.append(bytes([65 + len(self.names) % 100]) * 32)
        self.current[which] = self.index.open_namespace(self.names[-1], PAGE_SIZE)
        assert self.current[which] == len(self.names) - 1
        if buried:
            for lease, at in list(self.model.leases.items()):  # what is pinned can't go
                if at.namespace == old:
                    self.release(lease)
            for pool in sorted(self.model.pools):
                self.reap(pool, 9)

    @rule(pool=choice, pages=st.lists(st.integers(0, 4 * PER_SLAB), max_size=3))
    def lost(self, pool: int, pages: list[int]) -> None:
        at = self.a_pool(pool)
        holes = self.model.holes()
        gone = self.model.lost(at, pages)
        assert self.index.lost(at, u32(pages)).pages.tolist() == gone
        SEEN["resident -> free: lost"] += bool(gone)
        SEEN["lost: a hole"] += self.model.holes() > holes

    @rule(pool=choice, count=small)
    def reap(self, pool: int, count: int) -> None:
        at = self.a_pool(pool)
        pages = dict(self.model.pools[at].blocks)
        real = self.index.reap(at, count)
        self.tell(real.pages.tolist())
        paths = self.model.reap(at, count)
        assert real.pages.tolist() == [pages[path] for path in paths]
        SEEN["resident -> free: reap"] += bool(paths)

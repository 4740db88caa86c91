"""Rules for how blocks' lives end before eviction comes to them: a namespace is
invalidated, blocks expire, a fault takes a page, the
daemon is restarted; and what requests say of their lives.

The machine of machines.py with these verbs beside its own.
"""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from kvc2 import _core
from tests.oracles.blocks import PAGE_SIZE, Prompt, extras_digest, extras_of, tokens_of
from tests.oracles.machines import (
    PAGE_BYTES,
    PER_SLAB,
    SEEN,
    IndexMachine,
    choice,
    namespaces,
    prompts,
    small,
    some_hints,
    u32,
)
from tests.oracles.model_parts import RESIDENT, Hints


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

    @precondition(lambda self: self.model.leases)
    @rule(lease=choice, hints=st.one_of(st.just(Hints()), some_hints))
    def release_and_say(self, lease: int, hints: Hints) -> None:
        before = dict(self.model.lives)
        self.release(lease, hints)
        ended = [p for p, life in self.model.lives.items() if life.ended and p in before]
        SEEN["release: a session's own tail"] += bool(ended)

    @rule(seconds=st.integers(0, 3))
    def advance(self, seconds: int) -> None:
        living = [path for path in self.model.stamps if not self.model.dead(path)]
        pinned = dict(self.model.prefix_pins)
        over = self.model.advance(seconds)
        self.index.advance(self.model.now)
        there = any(path in self.model.pools[pool].blocks for pool, path in over)
        SEEN["pin: ends by itself"] += bool(over)
        SEEN["pin: a hard one of what is there ends"] += there and any(pinned[at] for at in over)
        self.pins_agree()
        SEEN["advance: blocks expire"] += any(map(self.model.dead, living))
        SEEN["advance: not all of a path"] += any(
            self.model.dead(p) and not self.model.dead(p[:-1]) and len(p) > 2 for p in living
        )

    @rule(namespace=namespaces, pool=choice, prompt=prompts, hard=st.booleans(),
          most=st.sampled_from([4, 4, 9, 0]))  # fmt: skip
    def pin(self, namespace: int, pool: int, prompt: Prompt, hard: bool, most: int) -> None:
        at = self.a_pool(pool)
        there = self.of_tokens(self.model.pools[at].blocks)
        if there and most == 4:
            prefix = there[pool % len(there)]
            prompt = list(prefix[1:])  # type: ignore[arg-type]
        else:
            prefix = (self.current[namespace], *prompt)
        if not prompt:
            return
        tokens, extras = tokens_of(prompt), extras_of(prompt)
        pins = self.model.prefix_pins
        while len(mine := [at for at in pins if at[1][0] not in self.key_spaces]) >= 3:
            old_pool, (old_namespace, *blocks) = mine[0]  # else soon nothing may be evicted
            known = self.index.unpin(old_namespace, old_pool, tokens_of(blocks), extras_of(blocks))  # type: ignore[arg-type]
            assert known == self.model.unpin(old_pool, (old_namespace, *blocks))
        ttl = (0, 1, 2)[pool // 7 % 3]
        keep = pool // 3 % 2 == 1
        pinned = self.index.pin(
            prefix[0],  # type: ignore[arg-type]
            at,
            tokens,
            hard=hard,
            max_blocks=most,
            ttl_s=ttl,
            keep_stronger=keep,
            extras=extras,
        )
        again = keep and (at, prefix) in pins
        before = (pins.get((at, prefix)), self.model.pin_ends.get((at, prefix)))
        assert pinned == self.model.pin(
            at, prefix, hard=hard, most=most, ttl=ttl, keep_stronger=keep
        )
        after = (self.model.prefix_pins.get((at, prefix)), self.model.pin_ends.get((at, prefix)))
        SEEN["pin: a stronger one stays"] += again and before == after
        SEEN["pin: a weaker one goes"] += again and before != after
        self.pins_agree()
        SEEN["pin: what is there"] += pinned and prefix in there
        SEEN["pin: what is not there"] += pinned and prefix not in there
        SEEN["pin: refused"] += not pinned

    def pins_agree(self) -> None:
        for at in self.model.pools:
            for kind in (False, True):
                paths = self.model.pinned_paths(at, hard=kind)
                assert self.index.pinned_blocks(at, hard=kind) == len(paths)
                for tenant in (0, 1):
                    count = sum(self.model.tenant(path) == tenant for path in paths)
                    assert self.index.pinned_blocks(at, hard=kind, tenant=tenant) == count

    @rule(which=st.integers(0, 1), pool=choice, blocks=st.integers(0, 4), of_bytes=st.booleans(),
          joins=st.sampled_from([False, False, True]), trims=st.booleans())  # fmt: skip
    def limit(
        self, which: int, pool: int, blocks: int, of_bytes: bool, joins: bool, trims: bool
    ) -> None:
        """A tenant gets a quota, a namespace, and what is too much is trimmed."""
        at = self.a_pool(pool)
        tier = self.model.pools[at].tier
        late = (1, tier) not in self.model.quotas and 1 in self.model.tenants.values()
        limit = {"max_bytes": blocks * PAGE_BYTES + 1} if of_bytes else {"max_blocks": blocks}
        with pytest.raises(ValueError, match="quota") if late else contextlib.nullcontext():
            self.index.set_quota(1, tier, **limit)
        if not late:
            self.model.quotas[1, tier] = blocks
        if joins:
            self.index.set_tenant(self.current[which], 1)
            self.model.tenants[self.current[which]] = 1
        if trims:
            self.trim(at)

    def trim(self, pool: int) -> None:
        pages = dict(self.model.pools[pool].blocks)
        SEEN["trim: over a quota"] += bool(self.model.over(pool))
        real = self.index.trim(pool)
        self.tell(real.pages.tolist())
        paths = self.model.trim(pool)
        assert real.pages.tolist() == [pages[path] for path in paths]
        SEEN["resident -> free: trim"] += bool(paths)

    @invariant()
    def quotas_agree(self) -> None:
        for tenant, tier in self.model.quotas:
            blocks = self.model.quota_use(tenant, tier)
            assert self.index.quota_use(tenant, tier) == (blocks * PAGE_BYTES, blocks)

    @rule(namespace=namespaces, pool=choice, prompt=prompts)
    def unpin(self, namespace: int, pool: int, prompt: Prompt) -> None:
        if not prompt:
            return
        at, prefix = self.a_pool(pool), (self.current[namespace], *prompt)
        real = self.index.unpin(prefix[0], at, tokens_of(prompt), extras_of(prompt))  # type: ignore[arg-type]
        assert real == self.model.unpin(at, prefix)

    @rule(which=st.integers(0, 1), seconds=st.sampled_from([0, 2, 9, 9, 9]))
    def expire_by(self, which: int, seconds: int) -> None:
        if seconds == 0 and which == 0:
            return  # all of it dead at once, too often
        second = max(1, self.model.now + seconds)
        self.index.expire_by(self.current[which], second)
        self.model.expire_by(self.current[which], second)
        SEEN["expire_by: what lived for ever"] += seconds == 9 and bool(self.model.lives)

    @rule(pool=choice, count=small)
    def reap(self, pool: int, count: int) -> None:
        at = self.a_pool(pool)
        pages = dict(self.model.pools[at].blocks)
        real = self.index.reap(at, count)
        self.tell(real.pages.tolist())
        paths = self.model.reap(at, count)
        assert real.pages.tolist() == [pages[path] for path in paths]
        SEEN["resident -> free: reap"] += bool(paths)

    @rule(order=st.randoms(use_true_random=False))
    def restore(self, order: object) -> None:
        """What the durable pool holds, in any order, in a fresh index."""
        at = self.model.pools[self.disk]
        rows = [(p, page) for p, page in at.blocks.items() if at.state[page] == RESIDENT]
        order.shuffle(rows)  # type: ignore[attr-defined]
        living = [p for p, _ in rows if p[0] not in self.model.retired]
        whole = {p for p in living if all(at.resident(p[:n]) for n in range(2, len(p) + 1))}
        fresh = _core.Index()
        disk = fresh.add_pool(
            page_size=PAGE_SIZE, pages_per_slab=PER_SLAB, below=None, durable=True
        )
        for _ in range(5):
            fresh.add_slab(disk)
        for number, name in enumerate(self.names):
            fresh.open_namespace(name, PAGE_SIZE, opaque=number in self.key_spaces)
        for namespace in self.model.retired:
            assert fresh.retire(namespace) == 0
        chains = [self.names_of(p) for p, _ in rows]
        ends = [self.model.life(p).expires for p, _ in rows]
        none = (0,) * 17
        keys: list[tuple[int, ...]] = [
            p[1] if p[0] in self.key_spaces else none
            for p, _ in rows  # type: ignore[misc]
        ]
        answers = fresh.restore(
            disk,
            np.frombuffer(b"".join(c[-1] for c in chains), np.uint8).reshape(-1, 32),
            np.frombuffer(b"".join(c[-2] for c in chains), np.uint8).reshape(-1, 32),
            tokens_of([(0, 0) if p[0] in self.key_spaces else p[-1] for p, _ in rows]).reshape(  # type: ignore[misc]
                -1, PAGE_SIZE
            ),
            u32([page for _, page in rows]),
            np.array([self.generations[page] for _, page in rows], dtype=np.uint64),
            u32([self.model.stamps[p] for p, _ in rows]),
            u32([0 if math.isinf(e) else max(1, e) for e in ends]),
            external_bytes=np.array([key[0] for key in keys], np.uint8),
            external_keys=u32([key[1:] for key in keys]).view(np.uint8).reshape(-1, 64),
            extras=np.frombuffer(
                b"".join(extras_digest(p[-1]) or bytes(32) for p, _ in rows),  # type: ignore[arg-type]
                np.uint8,
            ).reshape(-1, 32),
        )
        fresh.advance(self.model.now)
        fresh.check()
        restored = [_core.RESTORED if p in whole else _core.ORPHAN for p, _ in rows]
        assert answers.tolist() == restored
        lifetimes = fresh.lifetimes(disk).reshape(-1, 2).tolist()
        for (path, page), end in zip(rows, ends, strict=True):
            expires = 0 if math.isinf(end) else max(1, end)
            there = [expires, self.generations[page] % 2**32] if path in whole else [0, 0]
            assert lifetimes[page] == there
        SEEN["free -> resident: restore"] += _core.RESTORED in restored
        SEEN["restore: an orphan"] += _core.ORPHAN in restored
        for namespace, *blocks in self.of_tokens(path for path, _ in rows):
            living = {p for p in whole if not self.model.dead(p)}
            longest = next(n for n in range(len(blocks), -1, -1)
                           if n == 0 or (namespace, *blocks[:n]) in living)  # fmt: skip
            found = fresh.match(namespace, disk, tokens_of(blocks), extras_of(blocks))  # type: ignore[arg-type]
            assert found.blocks == longest

    def used_by_leases(self) -> set[object]:
        return {lease.namespace for lease in self.model.leases.values()}

    def teardown(self) -> None:
        """Whatever was done: a namespace is closed exactly when nothing is of it, once, and its
        number is another's then."""
        if not self.model.pools:
            return
        used = self.used_by_leases()
        used |= {prefix[0] for _, prefix in self.model.prefix_pins}
        used |= {path[0] for at in self.model.pools.values() for path in at.blocks}
        closed = [each for each in range(len(self.names)) if self.index.close_namespace(each)]
        assert closed == [each for each in range(len(self.names)) if each not in used]
        self.index.check()
        assert self.index.counts().namespaces == len(self.names) - len(closed)
        for each in closed:
            with pytest.raises(KeyError):
                self.index.close_namespace(each)
            with pytest.raises(KeyError):
                self.index.match(each, self.gpus[0], u32([1]))
            with pytest.raises(KeyError):
                self.index.match_keys(each, self.gpus[0], [b"a"])
        numbers = [self.index.open_namespace(b"%32d" % each, PAGE_SIZE) for each in closed]
        assert sorted(numbers) == closed
        self.index.check()

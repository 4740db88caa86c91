"""The index's machine with a namespace of opaque keys beside those of tokens, over the same pools:
leases on some keys, of which any may be missing, and keys that nobody has asked for before they are
put."""

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kvc2 import _core
from kvc2._core import Why
from tests.oracles.blocks import PAGE_SIZE
from tests.oracles.deaths import Explained, explain
from tests.oracles.key_models import KeysModel, words
from tests.oracles.lives import IndexLives
from tests.oracles.machines import SEEN, choice, of_hints, small, some_hints, u32
from tests.oracles.model_parts import DUPLICATE, NO_HINTS, PRIVATE, REFUSED, RESIDENT, Hints

KEYS = [b"a", b"a\0", b"k" * 32, b"k" * 64, b"image of a cat", b"b", b"c", b"d"]
NO_PAGE = _core.NO_PAGE
some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6)


class KeysMachine(IndexLives):
    model: KeysModel

    def __init__(self) -> None:
        super().__init__()
        self.model = KeysModel(self.policy)

    @initialize(limited=st.booleans(), picky=st.sampled_from([False, True]))
    def build(self, limited: bool, picky: bool) -> None:
        super().build(limited, picky)
        self.open_keys()

    def open_keys(self) -> None:
        self.names.append(bytes([107, len(self.names) % 100]) * 16)
        self.space = self.index.open_namespace(self.names[-1], PAGE_SIZE, opaque=True)
        assert self.space == len(self.names) - 1
        self.key_spaces.add(self.space)

    def a_key_lease(self, pick: int) -> int:
        leases = sorted(self.model.key_leases)
        return pick if pick in leases else leases[pick % len(leases)]

    def calm(self) -> None:
        for lease in list(self.model.key_leases):
            self.release_keys(lease)
        super().calm()

    def used_by_leases(self) -> set[object]:
        return super().used_by_leases() | {at.namespace for at in self.model.key_leases.values()}

    @rule(pool=choice, keys=some_keys, hints=st.one_of(st.just(NO_HINTS), some_hints))
    def acquire_keys(self, pool: int, keys: list[bytes], hints: Hints = NO_HINTS) -> None:
        at = self.a_head(pool)
        if not self.model.pools[at].closed:
            self.open_lease(at, keys, hints)

    def open_lease(
        self, pool: int, keys: list[bytes], hints: Hints = NO_HINTS, *, touches: bool = True
    ) -> int:
        """With 3 open the oldest ends."""
        if len(self.model.key_leases) == 3:
            self.release_keys(min(self.model.key_leases))
        real = self.index.acquire_keys(self.space, pool, keys, of_hints(hints), touches=touches)
        blocks = list(map(words, keys))
        self.model.acquire_keys(real.id, self.space, pool, blocks, hints, touches=touches)
        lease = self.model.key_leases[real.id]
        assert real.found.tolist() == lease.found
        SEEN["keys: no use of what is there"] += not touches and any(lease.found)
        SEEN["keys: some are there"] += 0 < sum(lease.there) < len(keys)
        ends = lease.there[:1] + lease.there[-1:]
        SEEN["keys: with gaps"] += all(ends) and not all(lease.there)
        SEEN["keys: one is on its way"] += any(
            self.model.arriving(pool, path) for path in lease.held()
        )
        return real.id

    @precondition(lambda self: self.model.key_leases)
    @rule(lease=choice, hints=st.one_of(st.just(NO_HINTS), some_hints))
    def release_keys(self, lease: int, hints: Hints = NO_HINTS) -> None:
        at = self.a_key_lease(lease)
        self.index.release(at, of_hints(hints))
        ended = [path for path, life in self.model.lives.items() if life.ended]
        self.model.release(at, hints)
        SEEN["keys: a session's own"] += len(ended) < sum(
            life.ended for life in self.model.lives.values()
        )

    @precondition(lambda self: self.model.key_leases)
    @rule(lease=choice, count=st.sampled_from([9, 9, 1]), loads=st.booleans(), lands=st.booleans())
    def bring_keys(self, lease: int, count: int, loads: bool, lands: bool) -> None:
        """By the calls that bring the blocks of any lease."""
        at = self.a_key_lease(lease)
        call = self.index.next_load if loads else self.index.promote
        real = call(at, count)
        self.check_brought(real, lambda came: (
            self.model.next_load(at, count, *came) if loads
            else self.model.promote(at, count, *came)
        ), "keys: next_load" if loads else "keys: promote")  # fmt: skip
        if lands:
            self.arrive()

    def check_brought(self, real: object, of_model: object, what: str) -> None:
        if isinstance(real, _core.Wait):
            self.tell([])
            assert of_model((None, [])) == real.transfer  # type: ignore[operator]
            SEEN[f"{what}: wait"] += 1
            return
        assert real is None or isinstance(real, _core.Transfer)
        pages = [] if real is None else real.target_pages.tolist()
        self.tell(pages)
        expected = of_model((None if real is None else real.id, pages))  # type: ignore[operator]
        assert not isinstance(expected, int), f"did not wait for {expected}"
        self.check_transfer(real, expected)
        SEEN[what] += real is not None

    @rule(pool=choice, keys=some_keys, count=small, touches=st.booleans(), lands=st.booleans())
    def prefetch_keys(
        self, pool: int, keys: list[bytes], count: int, touches: bool, lands: bool
    ) -> None:
        at = self.a_head(pool)
        paths = [(self.space, words(key)) for key in keys]
        real = self.index.prefetch_keys(self.space, at, keys, count, touches=touches)
        chain = self.model.chain(at)
        self.model.clock += touches
        for path in paths if touches else []:
            if self.model.find_key(path, chain):
                self.model.stamps[path] = self.model.clock
        self.check_brought(
            real,
            lambda came: self.model.prefetch_keys(chain, paths, count, came),  # type: ignore[arg-type]
            "keys: prefetch",
        )
        if lands:
            self.arrive()

    @rule(pool=choice, keys=some_keys, page=choice, foreign=st.integers(0, 5), under=st.booleans(),
          hints=st.one_of(st.just(NO_HINTS), some_hints))  # fmt: skip
    def put_keys(
        self, pool: int, keys: list[bytes], page: int, foreign: int, under: bool, hints: Hints
    ) -> None:
        mine = [i for i, each in self.model.key_leases.items() if each.namespace == self.space]
        at = self.model.key_leases[mine[0]].pool if mine and under else self.a_head(pool)
        self.grant(at, len(keys))
        pages = self.some(at, PRIVATE, len(keys), page)
        if foreign == 0 and pages:
            pages[0] = page % 9
        self.put(at, keys[: len(pages)], pages, mine[0] if mine and under else None, hints)
        self.put(at, keys[: len(pages)], pages, None, hints)

    def put(
        self,
        pool: int,
        keys: list[bytes],
        pages: list[int],
        lease: int | None = None,
        hints: Hints = NO_HINTS,
    ) -> None:
        real = self.index.commit_keys(
            self.space, pool, keys, u32(pages), lease=lease, hints=of_hints(hints)
        )
        blocks = list(map(words, keys))
        answers = self.model.commit_keys((self.space, pool), blocks, pages, lease, hints)
        assert real.tolist() == answers
        SEEN["keys: put"] += _core.ADOPTED in answers
        SEEN["keys: put under a lease"] += _core.ADOPTED in answers and lease is not None
        SEEN["keys: a duplicate"] += DUPLICATE in answers
        SEEN["keys: some refused, some not"] += REFUSED in answers and _core.ADOPTED in answers

    @rule(pool=choice, keys=some_keys, deep=st.booleans(), short=st.integers(0, 2),
          lands=st.booleans(), ends=st.booleans())  # fmt: skip
    def objects_come_back(
        self, pool: int, keys: list[bytes], deep: bool, short: int, lands: bool, ends: bool
    ) -> None:
        """What was put goes down, and a lease brings it up again; the last copy may fail."""
        at = self.living(pool)
        self.calm()
        self.grant(at, len(keys))
        pages = self.some(at, PRIVATE, len(keys), 0)
        self.put(at, keys[: len(pages)], pages)
        self.demote_all(9, to_disk=deep)
        for each in [*self.gpus, self.cpu][: 3 if deep else 2]:
            self.evict(each, 9)
        lease = self.open_lease(at, [*keys[1:], KEYS[-1], keys[0]])
        for _ in range(2):
            self.bring_keys(lease, 9, True, lands)
        self.bring_keys(lease, 9, False, False)
        self.open_lease(at, [keys[0], KEYS[-1], keys[-1]])
        held = len(self.model.key_leases[lease].held())
        self.arrive(short)
        SEEN["keys: a transfer fails"] += len(self.model.key_leases[lease].held()) < held
        self.bring_keys(lease, 9, False, True)
        self.grant(at, 2)
        pages = self.some(at, PRIVATE, 2, 0)
        self.put(at, [KEYS[-1], keys[0]][: len(pages)], pages, lease)
        if ends:
            self.release_keys(lease, Hints(end=True))

    def while_it_moves(self, pool: int, what: str) -> None:
        namespace, block = self.model.transfers[self.last_transfer].paths[0][:2]
        if what != "use" or namespace not in self.key_spaces:
            super().while_it_moves(pool, what)
        elif namespace == self.space:
            [key] = [key for key in KEYS if words(key) == block]
            lease = self.open_lease(pool if pool in self.gpus else self.engine(pool), [key])
            self.bring_keys(lease, 9, pool == self.disk, False)

    @rule(rarely=st.sampled_from([False] * 5 + [True]))
    def retire_keys(self, rarely: bool) -> None:
        if not rarely:
            return
        assert self.index.retire(self.space) == self.model.retire(self.space)
        self.open_keys()

    @rule(pool=choice, keys=some_keys, hard=st.booleans(), most=st.sampled_from([9, 1]),
          ttl=st.sampled_from([0, 1, 3]), keep=st.booleans())  # fmt: skip
    def pin_keys(
        self, pool: int, keys: list[bytes], hard: bool, most: int, ttl: int, keep: bool
    ) -> None:
        at = self.a_pool(pool)
        pins = [p for p in self.model.prefix_pins if p[1][0] in self.key_spaces]
        if keep:
            pins = pins[2:]
        for old_pool, path in pins:  # else soon nothing may be evicted
            [key] = [key for key in KEYS if words(key) == path[1]]
            assert self.index.unpin_keys(path[0], old_pool, [key, key]).tolist() == [1, 0]  # type: ignore[arg-type]
            self.model.unpin(old_pool, path)
        paths = [(self.space, words(key)) for key in keys]
        pinned = [
            self.model.pin(at, path, hard=hard, most=most, ttl=ttl, keep_stronger=keep)
            for path in paths
        ]
        real = self.index.pin_keys(
            self.space, at, keys, hard=hard, max_blocks=most, ttl_s=ttl, keep_stronger=keep
        )
        assert real.tolist() == pinned
        SEEN["keys: pinned"] += any(pinned)
        SEEN["keys: a pin refused"] += not all(pinned)

    @invariant()
    def keys_agree(self) -> None:
        for pool in [*self.gpus, self.cpu]:
            chain = self.model.chain(pool)
            real = self.index.match_keys(self.space, pool, KEYS)
            paths = [(self.space, words(key)) for key in KEYS]
            assert real.tolist() == [self.model.find_key(path, chain) for path in paths]
            explained = self.index.explain_keys(self.space, chain, KEYS)
            for path, each in zip(paths, explained, strict=True):
                expected = explain(self.model, self.space, chain, [path[1]])
                stranger = expected.why == Why.DIVERGED  # no key begins like another
                why = Why.NEVER_SEEN if stranger else expected.why
                told = Explained(expected.tiers, why, expected.death)
                self.check_explained(each, told, [path[1]])

    @invariant()
    def key_leases_agree(self) -> None:
        for lease, at in self.model.key_leases.items():
            real = self.index.key_lease(lease)
            blocks, state = self.model.pools[at.pool].blocks, self.model.pools[at.pool].state
            there = zip(at.paths, at.there, strict=True)
            pages = [blocks[path] if held else NO_PAGE for path, held in there]
            assert real.pages.tolist() == pages
            rests = [page != NO_PAGE and state[page] == RESIDENT for page in pages]
            assert real.arrived.tolist() == rests
            assert real.found.tolist() == at.found
            filled = [p for p in zip(at.paths, at.there, strict=True) if p[1]]
            ways = [self.model.filling(at.pool, path) for path, _ in filled
                    if state[blocks[path]] != RESIDENT]  # fmt: skip
            assert real.transfer == max(ways, default=0)
            held = sum(self.model.pools[self.disk].resident(path) for path in at.held())
            assert self.index.held_in(lease, self.disk) == held

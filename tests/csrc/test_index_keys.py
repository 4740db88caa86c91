"""Opaque keys: objects that their engine names itself. Random walks: test_index_machine.py."""

import hashlib

import numpy as np
import pytest

from kvc2 import _core

NAME, KEYS = b"o" * 32, [b"a", b"b" * 32, b"c" * 64, b"a\0"]
NO_PAGE = _core.NO_PAGE


class Store:
    """A cpu pool of 6 pages over a durable one of 8, and an engine's of 4 above."""

    def __init__(self) -> None:
        self.index = _core.Index()
        self.disk = self.pool(8, None, durable=True)
        self.cpu = self.pool(6, self.disk)
        self.gpu = self.pool(4, self.cpu)
        self.space = self.index.open_namespace(NAME, 1, opaque=True)

    def pool(self, pages: int, below: int | None, *, durable: bool = False) -> int:
        pool = self.index.add_pool(page_size=1, pages_per_slab=pages, below=below, durable=durable)
        self.index.add_slab(pool)
        return pool

    def put(self, *keys: bytes, pool: int | None = None) -> np.ndarray:
        at = self.cpu if pool is None else pool
        pages = self.index.grant(at, len(keys))
        answers = self.index.commit_keys(self.space, at, keys, pages)
        assert answers.tolist() == [_core.ADOPTED] * len(keys)
        return pages

    def demote(self, pool: int) -> _core.Records:
        transfer = self.index.plan_demote(pool, 8)
        assert transfer is not None
        self.index.complete(transfer.id, transfer.source_pages.size)
        assert transfer.records is not None
        return transfer.records

    def found(self, *keys: bytes) -> list[int]:
        self.index.check()
        return self.index.match_keys(self.space, self.cpu, keys).tolist()


@pytest.fixture
def store() -> Store:
    return Store()


def names_of(key: bytes) -> tuple[bytes, bytes]:
    """Block key and digest."""
    words = len(key).to_bytes(4, "little") + key.ljust(64, b"\0")
    root = _core.xxh3_128(NAME)
    return _core.xxh3_128(root + words), hashlib.sha256(NAME + words).digest()


def test_keys_are_put_without_being_asked_for_and_found_each_for_itself(store: Store) -> None:
    store.put(KEYS[0], KEYS[2])
    assert store.found(*KEYS, KEYS[0]) == [1, 0, 1, 0, 1]
    pages = store.index.grant(store.cpu, 3)
    answers = store.index.commit_keys(
        store.space, store.cpu, [KEYS[0], KEYS[1], KEYS[3]], np.array([*pages[:2], 99], np.uint32)
    )
    assert answers.tolist() == [_core.DUPLICATE, _core.ADOPTED, _core.REFUSED]
    assert store.index.give_back(store.cpu, pages[[0, 2]])  # a duplicate's page is the caller's
    assert store.found(*KEYS) == [1, 1, 1, 0]


def test_a_lease_pins_what_is_there_and_brings_the_rest_from_disk(store: Store) -> None:
    index = store.index
    store.put(*KEYS[:3])
    store.demote(store.cpu)
    index.evict(store.cpu, 9)
    [page] = store.put(KEYS[3]).tolist()
    assert store.found(*KEYS, b"x") == [2, 2, 2, 1, 0]
    lease = index.acquire_keys(store.space, store.cpu, [*KEYS, b"x"])
    assert lease.pages.tolist() == [NO_PAGE, NO_PAGE, NO_PAGE, page, NO_PAGE]
    assert (lease.found.tolist(), lease.transfer) == ([2, 2, 2, 1, 0], 0)
    assert index.next_load(lease.id, 9) is None
    first = index.promote(lease.id, 2)
    rest = index.promote(lease.id)
    assert first is not None
    assert rest is not None
    assert (first.source, first.target, rest.target_pages.size) == (store.disk, store.cpu, 1)
    index.complete(first.id, 1)  # the second has failed
    index.complete(rest.id, 1)
    view = index.key_lease(lease.id)
    assert (view.pages == NO_PAGE).tolist() == [False, True, False, False, True]
    assert index.evict(store.cpu, 9).pages.size == 0
    again = index.promote(lease.id)
    assert again is not None
    assert index.key_lease(lease.id).transfer == again.id
    index.complete(again.id, 1)
    index.release(lease.id)
    assert index.evict(store.cpu, 9).pages.size == 4
    assert store.found(*KEYS, b"x") == [2, 2, 2, 0, 0]


def test_a_lease_of_an_engine_waits_for_what_another_loads(store: Store) -> None:
    index = store.index
    store.put(*KEYS[:2])
    store.demote(store.cpu)
    index.evict(store.cpu, 9)
    one, two = (index.acquire_keys(store.space, store.gpu, KEYS).id for _ in range(2))
    load = index.next_load(one, 1)
    assert isinstance(load, _core.Transfer)
    other = index.next_load(two, 9)  # what nobody loads yet
    assert isinstance(other, _core.Transfer)
    wait = index.next_load(two, 9)
    assert isinstance(wait, _core.Wait)
    assert wait.transfer == load.id
    assert isinstance(
        index.prefetch_keys(store.space, store.cpu, KEYS, 9, touches=True), _core.Wait
    )
    for transfer in (load.id, other.id):
        index.complete(transfer, 1)
    promote = index.promote(two)
    assert promote is not None
    assert index.promote(one) is None  # on their way for both
    assert index.key_lease(one).transfer == promote.id
    index.complete(promote.id, 2)
    assert index.held_in(one, store.cpu) == 2
    assert index.release_all(np.array([one, two, 9], np.uint64)) == 2
    index.check()


def test_what_a_lease_commits_stays_until_its_release(store: Store) -> None:
    index = store.index
    lease = index.acquire_keys(store.space, store.cpu, KEYS[:1], _core.Hints(session_end=True)).id
    pages = index.grant(store.cpu, 2)
    for _ in range(2):  # again: the same answer, and no second pin
        answers = index.commit_keys(store.space, store.cpu, KEYS[:2], pages, lease=lease)
        assert answers.tolist() == [_core.ADOPTED] * 2
    assert index.evict(store.cpu, 9).pages.size == 0
    index.release(lease)
    assert index.evict(store.cpu, 9).pages.size == 2
    other = index.open_namespace(b"p" * 32, 1, opaque=True)
    lease = index.acquire_keys(other, store.cpu, KEYS).id
    with pytest.raises(ValueError, match="another namespace or pool"):
        index.commit_keys(store.space, store.cpu, KEYS[:2], pages, lease=lease)
    with pytest.raises(KeyError):
        index.commit_keys(store.space, store.cpu, KEYS[:2], pages, lease=99)


def test_records_name_keys_and_a_restart_takes_them_back(store: Store) -> None:
    store.put(*KEYS)
    records = store.demote(store.cpu)
    assert records.external_bytes.tolist() == list(map(len, KEYS))
    for i, key in enumerate(KEYS):
        assert records.external_keys[i].tobytes() == key.ljust(64, b"\0")
        assert (records.keys[i].tobytes(), records.digests[i].tobytes()) == names_of(key)
        assert records.parents[i].tobytes() == NAME
    again = Store()
    words = again.index.open_namespace(b"t" * 32, 1)
    rows = (records.digests, records.parents, records.tokens)
    numbers = (np.arange(4, dtype=np.uint32), records.generations, np.ones(4, np.uint32))
    answers = again.index.restore(
        again.disk, *rows, *numbers,
        external_bytes=records.external_bytes, external_keys=records.external_keys,
    )  # fmt: skip
    assert answers.tolist() == [_core.RESTORED] * 4
    assert again.found(*KEYS) == [2] * 4
    forged = records.external_keys.copy()
    forged[0, 0] ^= 1
    fresh = Store()
    answers = fresh.index.restore(
        fresh.disk, *rows, *numbers,
        external_bytes=records.external_bytes, external_keys=forged,
    )  # fmt: skip
    assert answers.tolist() == [_core.FORGED, *[_core.RESTORED] * 3]
    with pytest.raises(ValueError, match="external_bytes: more than 64"):
        fresh.index.restore(
            fresh.disk, *rows, *numbers,
            external_bytes=np.full(4, 65, np.uint8), external_keys=forged,
        )  # fmt: skip
    assert again.index.match(words, again.cpu, np.zeros(1, np.uint32)).blocks == 0


@pytest.mark.parametrize("opaque", [False, True])
def test_a_record_of_the_other_kind_hangs_on_nothing(opaque: bool) -> None:
    index = _core.Index()
    pool = index.add_pool(page_size=17, pages_per_slab=4, below=None, durable=True)
    index.add_slab(pool)
    index.open_namespace(NAME, 17, opaque=opaque)
    words = np.zeros((1, 17), np.uint32)
    words[0, :2] = (1, 97)  # the key b"a"; as tokens it has the same digest
    digest = np.frombuffer(names_of(b"a")[1], np.uint8).reshape(1, 32)
    keys = np.zeros((1, 64), np.uint8)
    keys[0, 0] = 97
    one, seventh = np.zeros(1, np.uint32), np.ones(1, np.uint64)
    for of_key in (False, True):
        answers = index.restore(
            pool, digest, np.frombuffer(NAME, np.uint8).reshape(1, 32).copy(), words, one,
            seventh, one + 1,
            external_bytes=np.full(1, of_key, np.uint8), external_keys=keys,
        )  # fmt: skip
        assert answers.tolist() == [_core.RESTORED if of_key == opaque else _core.ORPHAN]
    index.check()


def test_misuse_is_refused_by_name(store: Store) -> None:
    index, tokens = store.index, np.zeros(1, np.uint32)
    words = index.open_namespace(b"t" * 32, 1)
    for call in (index.match, index.prefetch):
        more = {} if call == index.match else {"max_pages": 1, "touches": False}
        with pytest.raises(ValueError, match="named by keys, not by tokens"):
            call(store.space, store.cpu, tokens, **more)
    with pytest.raises(ValueError, match="named by tokens, not by keys"):
        index.match_keys(words, store.cpu, KEYS)
    with pytest.raises(ValueError, match="other kind"):
        index.open_namespace(NAME, 1)
    with pytest.raises(ValueError, match=r"keys\[1\]: 65 bytes"):
        index.match_keys(store.space, store.cpu, [b"a", bytes(65)])
    with pytest.raises(ValueError, match=r"keys\[0\]: 0 bytes"):
        index.match_keys(store.space, store.cpu, [b""])
    with pytest.raises(TypeError, match=r"keys\[0\]: not a bytes"):
        index.match_keys(store.space, store.cpu, ["a"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="keys: not a sequence"):
        index.match_keys(store.space, store.cpu, b"abc")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pages: not one for each"):
        index.commit_keys(store.space, store.cpu, KEYS, tokens)
    with pytest.raises(ValueError, match="is durable"):
        index.acquire_keys(store.space, store.disk, KEYS)
    lease = index.acquire_keys(store.space, store.cpu, KEYS).id
    with pytest.raises(KeyError):
        index.lease(lease)
    with pytest.raises(KeyError):
        index.commit(lease, 0, tokens, tokens)
    assert not index.close_namespace(store.space)
    index.release(lease)
    assert index.close_namespace(store.space)


def test_a_key_that_must_come_from_further_away_keeps_no_other_waiting(store: Store) -> None:
    index = store.index
    store.put(KEYS[0])
    store.demote(store.cpu)
    index.evict(store.cpu, 9)
    store.put(KEYS[1])
    lease = index.acquire_keys(store.space, store.gpu, KEYS).id
    transfer = index.promote(lease)
    assert transfer is not None
    index.complete(transfer.id, 1)
    pages = index.key_lease(lease).pages
    assert (pages == NO_PAGE).tolist() == [True, False, True, True]


def test_keys_live_as_long_as_requests_say_and_a_session_s_own_go_first(store: Store) -> None:
    index = store.index
    index.advance(1)
    pages = index.grant(store.cpu, 3)
    ttl = _core.Hints(ttl_s=5)
    index.commit_keys(store.space, store.cpu, KEYS[:1], pages[:1], hints=ttl)
    index.commit_keys(store.space, store.cpu, KEYS[1:2], pages[1:2])
    lease = index.acquire_keys(store.space, store.cpu, KEYS[2:3], _core.Hints(session_end=True))
    index.commit_keys(store.space, store.cpu, KEYS[2:3], pages[2:3], lease=lease.id)
    index.release(lease.id)
    assert store.found(*KEYS) == [1, 1, 1, 0]
    assert index.evict(store.cpu, 1).pages.tolist() == [pages[2]]
    index.advance(6)
    assert store.found(*KEYS) == [0, 1, 0, 0]
    [gone] = index.explain_keys(store.space, [store.cpu], KEYS[:1])
    assert gone.why == _core.Why.DIED
    assert index.reap(store.cpu, 9).pages.tolist() == [pages[0]]


def test_a_picky_disk_takes_the_keys_that_were_asked_for(store: Store) -> None:
    index = store.index
    disk = index.add_pool(
        page_size=1, pages_per_slab=8, below=None, durable=True, second_access=True
    )
    index.add_slab(disk)
    store.cpu = store.pool(6, disk)
    store.put(*KEYS)
    assert index.plan_demote(store.cpu, 9) is None
    assert index.not_admitted(disk) == 4
    index.release(index.acquire_keys(store.space, store.cpu, KEYS[:1]).id)
    assert len(store.demote(store.cpu).keys) == 1


def test_a_session_s_end_ends_its_leases_and_nothing_comes_into_its_pool(store: Store) -> None:
    index = store.index
    store.put(*KEYS)
    lease = index.acquire_keys(store.space, store.gpu, KEYS).id
    index.close_pool(store.gpu)
    with pytest.raises(KeyError):
        index.key_lease(lease)
    with pytest.raises(ValueError, match="closed"):
        index.acquire_keys(store.space, store.gpu, KEYS)
    assert index.prefetch_keys(store.space, store.gpu, KEYS, 9, touches=False) is None
    index.check()


def test_a_lease_that_is_no_use_of_its_keys_pins_them_and_makes_none_warmer(store: Store) -> None:
    index = store.index
    for key in KEYS[:2]:
        store.put(key)
    lease = index.acquire_keys(store.space, store.cpu, [KEYS[0], b"x"], touches=False)
    assert (lease.found.tolist(), lease.arrived.tolist()) == ([1, 0], [1, 0])
    assert index.evict(store.cpu, 9).pages.size == 1
    store.put(KEYS[1])
    index.release_all(np.array([lease.id], np.uint64))
    index.evict(store.cpu, 1)
    assert store.found(*KEYS[:2]) == [0, 1]  # colder, though a lease was on it since


def test_a_lease_on_no_keys_takes_commits_and_keeps_them(store: Store) -> None:
    index = store.index
    lease = index.acquire_keys(store.space, store.cpu, [], touches=False).id
    pages = index.grant(store.cpu, 2)
    answers = index.commit_keys(store.space, store.cpu, KEYS[:2], pages, lease=lease)
    assert answers.tolist() == [_core.ADOPTED] * 2
    assert index.evict(store.cpu, 9).pages.size == 0
    index.release_all(np.array([lease], np.uint64))
    assert store.found(*KEYS[:2]) == [1, 1]
    assert index.evict(store.cpu, 9).pages.size == 2

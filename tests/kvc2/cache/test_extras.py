"""Prompts with images: what is shared, what is not, and that every call that takes tokens takes
their extras, over a daemon in the same process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from kvc2 import _core
from kvc2.answers import beginning
from kvc2.cache.extras import prompt_extras
from kvc2.client import Admin, ArenaTerms, Asked, LeaseCommit, Media, NamespaceHandle, Streams
from kvc2.commands import prompts
from kvc2.errors import InvalidRequest
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import PAGE_SIZE, TinyEngine, identity, layout

TOKENS = np.concatenate([np.arange(40), np.full(50, 9), np.arange(20)]).astype(np.uint32)
BLOCKS = len(TOKENS) // PAGE_SIZE  # 6, of which an image at token 40 leaves 2 alone
CAT, DOG = b"cat".ljust(32), b"dog".ljust(32)


def asked(*extras: Media) -> Asked:
    return Asked(TOKENS, extras=extras)


AT_40 = asked(Media(40, 50, CAT))
OTHERS = {
    "no image": (asked(), 2),
    "another image": (asked(Media(40, 50, DOG)), 2),
    "one token later": (asked(Media(41, 50, CAT)), 2),
    "one token more": (asked(Media(40, 51, CAT)), 2),
    "a second one behind it": (asked(Media(40, 50, CAT), Media(89, 1, DOG)), 5),
    "a second one in its block": (asked(Media(40, 50, CAT), Media(41, 1, DOG)), 2),
    "a second one at its token": (asked(Media(40, 50, CAT), Media(40, 50, DOG)), 2),
    "the two in the other order": (asked(Media(40, 50, DOG), Media(40, 50, CAT)), 2),
    "one before it": (asked(Media(0, 1, DOG), Media(40, 50, CAT)), 0),
    "one in the last block, which isn't full": (asked(Media(40, 50, CAT), Media(99, 9, DOG)), 6),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDaemon]:
    with ServedDaemon(serve_config(tmp_path_factory.mktemp("daemon")), cache=None) as daemon:
        yield daemon


@pytest.fixture
def engine(served: ServedDaemon) -> Iterator[TinyEngine]:
    with TinyEngine(served.address, arena=True) as engine:
        yield engine


@pytest.fixture
def handle(engine: TinyEngine, request: pytest.FixtureRequest) -> NamespaceHandle:
    """A namespace of the test's own that has AT_40 in the engine's pool."""
    of = engine.client.open_namespace(identity().encode(), "", request.node.name.encode())
    compute(engine, of, AT_40)
    return of


def compute(engine: TinyEngine, handle: NamespaceHandle, what: Asked) -> int:
    """Acquires, commits in two calls, releases; the blocks that were there."""
    found = engine.client.acquire(handle, b"r", what, grant_pages=BLOCKS)
    first = found.matched_tokens // PAGE_SIZE
    for block in range(first, BLOCKS):
        start, end = block * PAGE_SIZE, (block + 1) * PAGE_SIZE
        page = found.granted_pages[block - first : block - first + 1]
        begun = beginning(what.extras, start, end)
        part = LeaseCommit(b"r", block, what.tokens[start:end], page, begun)
        for _ in range(2):  # a call that comes again
            assert engine.client.commit([part]).results[0].tolist() == [_core.ADOPTED]
    engine.client.release([b"r"], returned=found.granted_pages[BLOCKS - first :])
    return first


def test_a_blocks_digest_is_of_all_that_begins_in_it() -> None:
    told = [Media(3, 7, CAT), Media(20, 2, DOG), Media(20, 9, CAT)]
    parts = [(3, 7, CAT)], [(4, 2, DOG), (4, 9, CAT)]
    known = [
        b"".join(np.array(each[:2], "<u4").tobytes() + each[2] for each in part) for part in parts
    ]
    digests = np.frombuffer(b"".join(hashlib.sha256(each).digest() for each in known), np.uint8)
    expected = _core.PromptExtras(np.array([0, 1], np.uint32), digests.reshape(-1, 32))
    found = prompt_extras(told, 16)
    keys = [_core.chain_keys(bytes(32), TOKENS, 16, each).tolist() for each in (expected, found)]
    assert keys[0] == keys[1] != _core.chain_keys(bytes(32), TOKENS, 16).tolist()
    assert prompt_extras((), 16) is None


@pytest.mark.parametrize("what", OTHERS)
def test_text_before_an_image_is_shared_and_nothing_after_another_one(
    engine: TinyEngine, handle: NamespaceHandle, what: str
) -> None:
    other, shared = OTHERS[what]
    assert engine.client.match(handle, AT_40).matched_tokens == BLOCKS * PAGE_SIZE
    assert engine.client.match(handle, other).matched_tokens == shared * PAGE_SIZE
    assert compute(engine, handle, other) == shared
    for each in (other, AT_40):
        assert engine.client.match(handle, each).matched_tokens == BLOCKS * PAGE_SIZE


def test_explain_tells_that_only_the_image_differs(
    served: ServedDaemon, engine: TinyEngine, handle: NamespaceHandle
) -> None:
    dog = asked(Media(40, 50, DOG))
    found = engine.client.explain(handle, dog)
    assert (found.why, found.hit_blocks, found.sibling_equal) == ("diverged", 2, PAGE_SIZE)
    said = list(prompts.lines(found, dog, None))
    assert said[-1] == "  a resident block in its place has the same tokens, and other extras"
    with Admin(served.address) as admin:
        name = bytes.fromhex(found.namespace)
        assert admin.explain(tokens=dog, namespace=name).sibling_equal == PAGE_SIZE
        assert admin.explain(tokens=AT_40, namespace=name).why == "nothing"


def test_a_pin_and_a_prefetch_are_of_one_image(engine: TinyEngine, handle: NamespaceHandle) -> None:
    client, dog = engine.client, asked(Media(40, 50, DOG))
    assert client.pin(handle, AT_40, tier="gpu", hard=True).resident_blocks == BLOCKS
    assert client.pin(handle, dog, tier="gpu", hard=True).resident_blocks == 2
    assert client.unpin(handle, asked(), tier="gpu") == 0
    assert [client.unpin(handle, each, tier="gpu") for each in (AT_40, dog)] == [BLOCKS, BLOCKS]
    assert sum(client.prefetch(handle, AT_40, tier="gpu").tiers) == BLOCKS * PAGE_SIZE
    assert sum(client.prefetch(handle, dog, tier="gpu").tiers) == 2 * PAGE_SIZE


def test_copies_and_streams_go_to_the_blocks_of_their_image(
    engine: TinyEngine, handle: NamespaceHandle
) -> None:
    client, bird = engine.client, Media(40, 50, b"bird".ljust(32))
    whole = TOKENS[: BLOCKS * PAGE_SIZE]
    payloads = [bytes([each]) * layout().payload_bytes for each in range(BLOCKS)]
    streamed = LeaseCommit(b"", 0, whole, np.zeros(0, np.uint32), [bird])
    assert set(Streams(client).write(handle, streamed, payloads).tolist()) <= {0, 1}
    found = client.acquire_in_arena(handle, b"a", asked(bird), ArenaTerms(skip_blocks=1))
    assert (found.matched_tokens, found.first_block) == (BLOCKS * PAGE_SIZE, 1)
    rows = np.zeros((BLOCKS - 1, layout().payload_bytes), np.uint8)
    assert Streams(client).read(b"a", rows, first_block=2).tolist() == [2, 3, 4, 5]
    assert [bytes(row) for row in rows[:4]] == payloads[2:]  # of 1 the pool has had it before
    client.release([b"a"])
    pages = client.grant(BLOCKS)
    fish = Media(40, 50, b"fish".ljust(32))
    copied = LeaseCommit(b"", 0, whole, pages, [fish])
    results = client.commit_copies(handle, [copied]).results[0].tolist()
    assert set(results[:2]) <= {0, 1}
    assert results[2:] == [_core.ADOPTED] * 4
    again = client.commit_copies(handle, [copied]).results[0].tolist()
    assert again == [_core.DUPLICATE] * BLOCKS
    assert client.match(handle, asked(fish)).matched_tokens == BLOCKS * PAGE_SIZE
    frog = Media(40, 50, b"frog".ljust(32))
    first = client.acquire_in_arena(handle, b"f", asked(frog)).matched_tokens // PAGE_SIZE
    rest = LeaseCommit(b"f", first, whole[first * PAGE_SIZE :], pages[first:], [frog])
    for _ in range(2):  # of a lease the same answer
        results = client.commit_copies(handle, [rest]).results[0].tolist()
        assert results == [_core.ADOPTED] * (BLOCKS - first)
    client.release([b"f"], returned=pages)


def test_keys_have_no_extras(engine: TinyEngine) -> None:
    keyed = engine.client.open_handle(NamespaceHandle(identity().encode(), opaque=True))
    what = Asked(keys=[b"k"], extras=[Media(0, 1, CAT)])
    for call in (engine.client.unpin, engine.client.prefetch):
        with pytest.raises(InvalidRequest, match="extras = '1 of them'"):
            call(keyed, what)


def test_a_commit_names_only_what_begins_in_its_blocks(
    engine: TinyEngine, handle: NamespaceHandle
) -> None:
    page = np.zeros(1, np.uint32)
    for extras in (AT_40.extras, [Media(15, 1, CAT)]):
        part = LeaseCommit(b"", 1, TOKENS[PAGE_SIZE : 2 * PAGE_SIZE], page, extras)
        with pytest.raises(InvalidRequest, match=r"extras\[0\].first_token.*16 to 31"):
            engine.client.commit_copies(handle, [part])

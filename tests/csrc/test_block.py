"""Hashes against the peers that define them, headers of whole arrays, wrong arguments."""

import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from kvc2 import _core

LENGTHS = [*range(2049), 4096, 65_535, 65_536, 1_000_003]
LAYOUT = bytes(range(32))
PAYLOAD_BYTES = 5000
PAGE_BYTES = 4096 + 8192
INSTRUCTION_SETS = ["portable", "avx2", "avx512"]


def blocks(count: int, page_size: int = 16, seed: int = 0) -> SimpleNamespace:
    """What the index calls Records, filled with noise."""
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        namespaces=rng.integers(0, 256, (count, 32), np.uint8),
        digests=rng.integers(0, 256, (count, 32), np.uint8),
        parents=rng.integers(0, 256, (count, 32), np.uint8),
        keys=rng.integers(0, 256, (count, 16), np.uint8),
        tokens=rng.integers(0, 1 << 32, (count, page_size), np.uint32),
        generations=rng.integers(1, 1 << 60, count, np.uint64),
        external_bytes=np.zeros(count, np.uint8),
        external_keys=np.zeros((count, 64), np.uint8),
        extras=np.zeros((count, 32), np.uint8),
    )


def named_by_key(records: SimpleNamespace, row: int, key: bytes) -> None:
    records.tokens[row] = 0
    records.external_bytes[row] = len(key)
    records.external_keys[row, : len(key)] = list(key)


def pages(count: int, seed: int = 1) -> tuple[bytearray, np.ndarray]:
    """Memory full of noise and the offsets of pages in it, not in order."""
    rng = np.random.default_rng(seed)
    memory = bytearray(rng.bytes(PAGE_BYTES * (count + 1)))
    return memory, rng.permutation(count + 1)[:count].astype(np.uint64) * PAGE_BYTES


def test_xxh3_is_that_of_the_xxhash_project_at_every_length():
    data = np.random.default_rng(2).bytes(max(LENGTHS))
    for length in LENGTHS:
        assert _core.xxh3_128(data[:length]) == xxhash.xxh3_128_digest(data[:length]), length


def test_sha256_is_that_of_the_standard_library_at_every_length():
    data = np.random.default_rng(3).bytes(max(LENGTHS))
    for length in LENGTHS:
        assert _core.sha256(data[:length]) == hashlib.sha256(data[:length]).digest(), length


@pytest.mark.parametrize("page_size", [1, 16, 512])
def test_digests_chain_over_full_blocks_only(page_size: int):
    tokens = np.arange(page_size * 5 + page_size - 1, dtype=np.uint32)
    parent, expected = bytes(range(32)), []
    for i in range(len(tokens) // page_size):
        block = tokens[i * page_size : (i + 1) * page_size]
        expected.append(hashlib.sha256((expected or [parent])[-1] + block.tobytes()).digest())
    digests = _core.chain_digests(parent, tokens, page_size)
    assert digests.shape == (len(expected), 32)
    assert digests.tobytes() == b"".join(expected)


def test_extras_are_hashed_after_the_tokens_of_their_block():
    tokens, extras = np.arange(12, dtype=np.uint32), hashlib.sha256(b"an image").digest()
    rows = np.frombuffer(extras, np.uint8).reshape(1, 32)
    found = _core.chain_digests(bytes(32), tokens, 4, _core.PromptExtras(np.uint32([1]), rows))
    digest = bytes(32)
    for block in range(3):
        words = tokens[4 * block : 4 * block + 4].tobytes()
        digest = hashlib.sha256(digest + words + (extras if block == 1 else b"")).digest()
        assert found[block].tobytes() == digest


@pytest.mark.parametrize("page_size", [1, 16, 512])
def test_what_is_encoded_verifies(page_size: int):
    records, (memory, offsets) = blocks(7, page_size), pages(7)
    checksums = _core.encode_headers(memory, offsets, records, LAYOUT, PAYLOAD_BYTES)
    for i, offset in enumerate(offsets.tolist()):
        payload = memory[offset + 4096 : offset + 4096 + PAYLOAD_BYTES]
        assert checksums[i].tobytes() == xxhash.xxh3_128_digest(bytes(payload))
        assert memory[offset : offset + 8] == b"KVC2PAGE"
        sector = bytes(memory[offset : offset + 4096])
        assert sector[4080:] == xxhash.xxh3_128_digest(sector[:4080])
        assert sector[16:48] == records.namespaces[i].tobytes()
        assert sector[1024:][: 4 * page_size] == records.tokens[i].tobytes()
        assert sector[288:296] == records.generations[i].tobytes()
    states = _core.verify_blocks(bytes(memory), offsets, records, LAYOUT, PAYLOAD_BYTES)
    assert states.tolist() == [_core.BLOCK_OK] * 7


def test_a_header_names_a_block_by_its_key_or_with_its_images():
    records, (memory, offsets) = blocks(4), pages(4)
    for row, key in enumerate([b"a", b"k" * 64, b"a\0"]):
        named_by_key(records, row, key)
    records.extras[1], records.extras[3] = 5, 6
    _core.encode_headers(memory, offsets, records, LAYOUT, PAYLOAD_BYTES)
    told = (LAYOUT, PAYLOAD_BYTES)
    assert _core.verify_blocks(memory, offsets, records, *told).tolist() == [_core.BLOCK_OK] * 4
    sectors = b"".join(bytes(memory[at : at + 4096]) for at in offsets.tolist())
    assert [sectors[i * 4096 + 128] for i in range(4)] == [1, 1, 1, 0]
    assert sectors[4096 + 184 : 4096 + 248] == b"k" * 64
    assert sectors[3 * 4096 + 248 : 3 * 4096 + 280] == bytes([6] * 32)
    found = _core.read_headers(sectors, records.generations, *told, 16)
    assert found.sound.tolist() == [1] * 4
    for name in ("tokens", "external_bytes", "external_keys", "extras"):
        assert (getattr(found, name) == getattr(records, name)).all()
    records.external_bytes[0] = 2  # "a" is not "a" and a zero
    records.external_keys[1, 63] ^= 1
    named_by_key(records, 3, b"x")
    states = _core.verify_blocks(memory, offsets, records, *told).tolist()
    other, fine = _core.BLOCK_OTHER, _core.BLOCK_OK
    assert states == [other, other, fine, other]
    records.extras[2, 31] = 1
    assert _core.verify_blocks(memory, offsets, records, *told).tolist() == [other] * 4
    records.external_bytes[2] = 65
    with pytest.raises(ValueError, match=r"records\.external_bytes: more than 64"):
        _core.verify_blocks(memory, offsets, records, *told)


@pytest.mark.parametrize("page_size", [1, 16, 512])
def test_a_header_alone_says_what_was_encoded(page_size: int):
    records, (memory, offsets) = blocks(7, page_size), pages(7)
    checksums = _core.encode_headers(memory, offsets, records, LAYOUT, PAYLOAD_BYTES)
    sectors = b"".join(bytes(memory[at : at + 4096]) for at in offsets.tolist())
    told = (LAYOUT, PAYLOAD_BYTES, page_size)
    found = _core.read_headers(sectors, records.generations, *told)
    assert found.sound.tolist() == [1] * 7
    for name in ("namespaces", "digests", "parents", "tokens", "external_bytes", "extras"):
        assert (getattr(found, name) == getattr(records, name)).all()
    assert (found.checksums == checksums).all()
    for others in (
        (LAYOUT[::-1], PAYLOAD_BYTES, page_size),
        (LAYOUT, PAYLOAD_BYTES + 1, page_size),
        (LAYOUT, PAYLOAD_BYTES, page_size % 512 + 1),
    ):
        assert not _core.read_headers(sectors, records.generations, *others).sound.any()
    generations = records.generations.copy()
    generations[3] += np.uint64(1)
    assert _core.read_headers(sectors, generations, *told).sound.tolist() == [1, 1, 1, 0, 1, 1, 1]
    for at in range(0, 4096, 5):
        flipped = bytearray(sectors)
        flipped[at] ^= 1
        assert _core.read_headers(flipped, records.generations, *told).sound.tolist()[0] == 0
    with pytest.raises(ValueError, match="fewer than 7 headers"):
        _core.read_headers(sectors[:-1], records.generations, *told)
    with pytest.raises(ValueError, match="page_size is 513"):
        _core.read_headers(sectors, records.generations, LAYOUT, PAYLOAD_BYTES, 513)


def test_encoding_writes_nothing_but_header_sectors():
    records, (memory, offsets) = blocks(3), pages(3)
    before = np.frombuffer(bytes(memory), np.uint8).copy()
    _core.encode_headers(memory, offsets, records, LAYOUT, PAYLOAD_BYTES)
    changed = np.flatnonzero(before != np.frombuffer(memory, np.uint8))
    inside = [(changed >= o) & (changed < o + 4096) for o in offsets.astype(np.int64)]
    assert np.logical_or.reduce(inside).all()


def test_each_fault_has_its_state_and_leaves_the_others_alone():
    records, (memory, offsets) = blocks(5), pages(5)
    _core.encode_headers(memory, offsets, records, LAYOUT, PAYLOAD_BYTES)
    at = [int(offset) for offset in offsets]
    memory[at[0] + 300] ^= 1
    records.digests[1, 4] ^= 1
    records.generations[2] += 1
    memory[at[3] + 4096 + PAYLOAD_BYTES - 1] ^= 0x80
    memory[at[4] + 4096 + PAYLOAD_BYTES] ^= 1  # padding is nobody's
    states = _core.verify_blocks(memory, offsets, records, LAYOUT, PAYLOAD_BYTES)
    assert states.tolist() == [
        _core.BLOCK_BAD_HEADER,
        _core.BLOCK_OTHER,
        _core.BLOCK_STALE,
        _core.BLOCK_BAD_PAYLOAD,
        _core.BLOCK_OK,
    ]


def test_another_layout_or_length_is_another_block():
    records, (memory, offsets) = blocks(1), pages(1)
    _core.encode_headers(memory, offsets, records, LAYOUT, PAYLOAD_BYTES)
    for layout, payload_bytes in [(bytes(32), PAYLOAD_BYTES), (LAYOUT, PAYLOAD_BYTES - 1)]:
        states = _core.verify_blocks(memory, offsets, records, layout, payload_bytes)
        assert states.tolist() == [_core.BLOCK_OTHER]


@pytest.mark.parametrize(
    ("offset", "error", "says"),
    [
        (512, ValueError, "offsets.0. = 512 is not a multiple"),
        (PAGE_BYTES * 2, IndexError, "offsets.0."),
        (PAGE_BYTES * 2 - 4096, IndexError, "offsets.0."),
        (2**64 - 4096, IndexError, "offsets.0."),
    ],
)
def test_an_offset_outside_is_refused_by_name(offset: int, error: type[Exception], says: str):
    memory, _ = pages(1)
    offsets = np.array([offset], np.uint64)
    for call in (_core.encode_headers, _core.verify_blocks):
        with pytest.raises(error, match=says):
            call(memory, offsets, blocks(1), LAYOUT, PAYLOAD_BYTES)


def test_a_wrong_argument_is_named():
    memory, offsets = pages(2)
    good = blocks(2)

    def encode(records: dict[str, np.ndarray] | None = None, **changes: object) -> None:
        arguments = {"memory": memory, "offsets": offsets, "layout_digest": LAYOUT} | changes
        changed = SimpleNamespace(**(vars(good) | (records or {})))
        _core.encode_headers(records=changed, payload_bytes=PAYLOAD_BYTES, **arguments)

    with pytest.raises(TypeError, match="memory"):
        encode(memory=bytes(memory))
    with pytest.raises(TypeError, match="offsets"):
        encode(offsets=offsets.astype(np.int64))
    with pytest.raises(ValueError, match="offsets"):
        encode(offsets=offsets[:1])
    with pytest.raises(ValueError, match="layout_digest"):
        encode(layout_digest=b"short")
    with pytest.raises(ValueError, match=r"records\.keys"):
        encode(records={"keys": good.keys[:, :15].copy()})
    with pytest.raises(ValueError, match=r"records\.digests is not C-contiguous"):
        encode(records={"digests": np.asfortranarray(good.digests)})
    with pytest.raises(ValueError, match=r"records\.tokens has 513"):
        encode(records={"tokens": np.zeros((2, 513), np.uint32)})
    with pytest.raises(TypeError, match=r"records\.tokens"):
        encode(records={"tokens": good.tokens.astype(">u4")})
    with pytest.raises(ValueError, match="page_size"):
        _core.chain_digests(bytes(32), np.zeros(4, np.uint32), 0)
    with pytest.raises(ValueError, match="parent"):
        _core.chain_digests(b"", np.zeros(4, np.uint32), 2)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_hashes_agree_on_every_instruction_set(isa: str):
    """The tests above, in a process whose core may use nothing better than `isa`."""
    tests = ["-k", "every_length or encoded", __file__]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"KVC2_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

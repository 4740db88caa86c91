"""Values of a remote store: nothing but the very block, put by a host with the secret, counts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kvc2 import _core
from kvc2.namespace import of_era
from kvc2.tiers.base import U8, PageShape
from kvc2.tiers.remote.codec import Chain, Sealer, Verdict, mac_key, shared_key, value_bytes

SIZE = 4
SHAPE = PageShape(hashlib.sha256(b"layout").digest(), SIZE, 1000, 8192, 1 << 20, 128)
NAME = hashlib.sha256(b"namespace").digest()
KEY = hashlib.sha256(b"key").digest()
BLOCKS = 5
KEYS = [b"k", b"x" * 64, b"k\0", b"\0", bytes(range(32))]
MUTATIONS = 1000


def chain(name: bytes = NAME, first_token: int = 0) -> Chain:
    tokens = np.arange(first_token, first_token + BLOCKS * SIZE, dtype=np.uint32)
    return Chain.of(name, tokens, SIZE, None, np.zeros((BLOCKS, 32), np.uint8))


def keyed(name: bytes = NAME, keys: list[bytes] = KEYS) -> Chain:
    return Chain.of_keys(name, keys, SIZE)


def payloads(seed: int = 0) -> U8:
    return np.frombuffer(np.random.default_rng(seed).bytes(BLOCKS * 1000), np.uint8)


OFFSETS = np.arange(BLOCKS, dtype=np.uint64) * np.uint64(1000)
EACH = np.arange(BLOCKS)


def sealed(of: Chain, key: bytes = KEY, seed: int = 0) -> list[bytes]:
    values = Sealer(key, SHAPE).seal(payloads(seed), OFFSETS, of.records(EACH))
    return [bytes(each) for each in values]


def opened(values: list[bytes], of: Chain, block: int = 0) -> tuple[list[Verdict], U8]:
    """Verdicts, and the memory into which good payloads were copied."""
    memory = np.zeros(BLOCKS * 1000, np.uint8)
    rows = EACH[block : block + len(values)]
    found = Sealer(KEY, SHAPE).open(values, of.records(rows), memory, OFFSETS[: len(values)])
    return found, memory


@pytest.mark.parametrize("of", [chain(), keyed()], ids=["tokens", "keys"])
def test_what_is_sealed_opens(of: Chain) -> None:
    found, memory = opened(sealed(of), of)
    assert found == [Verdict.GOOD] * BLOCKS
    assert (memory == payloads()).all()
    assert {len(each) for each in sealed(of)} == {value_bytes(SHAPE)}


def mutated(value: bytes, random: np.random.Generator, others: list[bytes]) -> bytes:
    """Another value: bits flipped, bytes lost, doubled, zeroed or moved, parts of other values."""
    kind, at = int(random.integers(7)), int(random.integers(len(value)))
    length = int(random.integers(1, 200))
    if kind == 0:
        return value[:at] + bytes([value[at] ^ (1 << int(random.integers(8)))]) + value[at + 1 :]
    if kind == 1:
        return value[:at]
    if kind == 2:
        return value + random.bytes(length)
    if kind == 3:
        return value[:at] + bytes(length) + value[at + length :]
    if kind == 4:
        return value[at:] + value[:at]
    other = others[int(random.integers(len(others)))]
    if kind == 5:
        return value[:at] + other[at:]
    return other


OTHER_KEYS = [b"l", b"x" * 63, b"k\0\0", b"\1", bytes(range(33))]


@pytest.mark.parametrize(
    ("of", "alike"),
    [
        (chain(), [chain(first_token=1), chain(of_era(NAME, 1)), chain(hashlib.sha256().digest())]),
        (
            keyed(),
            [
                keyed(keys=OTHER_KEYS),
                keyed(of_era(NAME, 1)),
                keyed(hashlib.sha256().digest()),
                chain(),
            ],
        ),
    ],
    ids=["tokens", "keys"],
)
def test_no_mutation_is_believed(of: Chain, alike: list[Chain]) -> None:
    """The others are all sound values: of other blocks, prompts, namespaces, eras and secrets."""
    random, values = np.random.default_rng(7), sealed(of)
    others = [
        *(value for each in alike for value in sealed(each)),
        *sealed(of, key=hashlib.sha256(b"another secret").digest()),
        *sealed(of, key=hashlib.sha256(b"another secret").digest(), seed=1),
    ]
    tried = 0
    while tried < MUTATIONS:
        block = int(random.integers(BLOCKS))
        rest = [each for i, each in enumerate(values) if i != block]
        forged = mutated(values[block], random, others + rest)
        if forged == values[block]:
            continue
        tried += 1
        found, memory = opened([forged], of, block)
        assert found[0] is not Verdict.GOOD, (tried, block)
        assert not memory.any(), "a byte was used"


def test_each_check_stands_alone() -> None:
    of, other_key = chain(), hashlib.sha256(b"another secret").digest()
    value = sealed(of)[0]
    assert opened([value[:-1]], of)[0] == [Verdict.SIZE]
    assert opened([value + b"x"], of)[0] == [Verdict.SIZE]
    assert opened([b""], of)[0] == [Verdict.SIZE]
    assert opened([sealed(of, key=other_key)[0]], of)[0] == [Verdict.MAC]
    # the header's checksum of the payload is no proof against who chooses both
    flipped = bytearray(value)
    flipped[5000] ^= 1
    assert opened([bytes(flipped)], of)[0] == [Verdict.MAC]
    # who has the secret, and puts a block of this namespace under another's name
    assert opened([sealed(of)[1]], of)[0] == [Verdict.OTHER]
    assert opened([sealed(chain(of_era(NAME, 1)))[0]], of)[0] == [Verdict.OTHER]
    # ... or whose memory flipped a bit between checksum and MAC
    spoiled = bytearray(value)
    spoiled[5000] ^= 1
    spoiled[-32:] = Sealer(KEY, SHAPE)._mac(memoryview(bytes(spoiled[:-32])))
    assert opened([bytes(spoiled)], of)[0] == [Verdict.PAYLOAD]


def test_each_value_is_judged_for_itself() -> None:
    values = sealed(chain())
    values[2] = values[1]
    found, memory = opened(values, chain())
    assert found == [Verdict.GOOD, Verdict.GOOD, Verdict.OTHER, Verdict.GOOD, Verdict.GOOD]
    assert not memory[2000:3000].any()
    assert (memory[3000:] == payloads()[3000:]).all()


def test_names_tell_layouts_prefixes_and_eras_apart() -> None:
    of, shape = chain(), SHAPE
    other_layout = PageShape(hashlib.sha256(b"other").digest(), SIZE, 1000, 8192, 1 << 20, 128)
    names = of.names(shape, 0, BLOCKS)
    assert len(set(names)) == BLOCKS
    assert not set(names) & set(of.names(other_layout, 0, BLOCKS))
    assert not set(names) & set(chain(of_era(NAME, 1)).names(shape, 0, BLOCKS))
    assert not set(names) & set(chain(first_token=1).names(shape, 0, BLOCKS))


def test_extras_are_in_the_names_after_them() -> None:
    tokens = np.arange(BLOCKS * SIZE, dtype=np.uint32)
    rows = np.zeros((BLOCKS, 32), np.uint8)
    rows[2] = np.frombuffer(hashlib.sha256(b"image").digest(), np.uint8)
    extras = _core.PromptExtras(np.array([2], np.uint32), rows[2:3])
    with_image = Chain.of(NAME, tokens, SIZE, extras, rows)
    plain = chain().names(SHAPE, 0, BLOCKS)
    found = with_image.names(SHAPE, 0, BLOCKS)
    assert found[:2] == plain[:2]
    assert not set(found[2:]) & set(plain)
    assert opened(sealed(with_image), with_image)[0] == [Verdict.GOOD] * BLOCKS
    assert opened([sealed(with_image)[2]], chain(), 2)[0] == [Verdict.OTHER]


def test_names_tell_keys_eras_and_prompts_apart() -> None:
    found = [
        *keyed(keys=KEYS + OTHER_KEYS).names(SHAPE, 0, 2 * BLOCKS),
        *keyed(of_era(NAME, 1)).names(SHAPE, 0, BLOCKS),
        *chain().names(SHAPE, 0, BLOCKS),
    ]
    assert len(set(found)) == len(found)
    assert keyed(keys=KEYS[2:]).names(SHAPE, 0, 1) == found[2:3]  # whatever stands beside it


def test_a_key_is_in_the_header() -> None:
    """As whoever has the secret might put it: under one key's name another one's block."""
    values = sealed(keyed(keys=OTHER_KEYS))
    assert opened(values, keyed())[0] == [Verdict.OTHER] * BLOCKS
    header = sealed(keyed())[1][:4096]
    assert b"x" * 64 in header


@pytest.mark.parametrize("tenant_secret", [b"", b"s" * 16])
def test_keys_follow_from_both_secrets(tenant_secret: bytes) -> None:
    key = shared_key(b"a" * 16, tenant_secret)
    assert key != shared_key(b"b" * 16, tenant_secret)
    assert key != shared_key(b"a" * 16, tenant_secret + b"x")
    assert mac_key(key, NAME) != mac_key(key, bytes(32))

"""What a record must say of a block, from the block's path: by its tokens, or by its key."""

import numpy as np

from kvc2 import _core
from tests.oracles.blocks import PAGE_SIZE, block_bytes, extras_digest, extras_of, tokens_of
from tests.oracles.model_parts import Path


def check_record(
    records: _core.Records, i: int, path: Path, names: list[bytes], *, opaque: bool
) -> None:
    """`names`: the namespace's, and the digest of each block of the path."""
    assert records.namespaces[i].tobytes() == names[0]
    assert [records.parents[i].tobytes(), records.digests[i].tobytes()] == names[-2:]
    blocks: list[tuple[int, ...]] = list(path[1:])  # type: ignore[arg-type]
    assert records.extras[i].tobytes() == (extras_digest(blocks[-1]) or bytes(32))
    if opaque:
        key = [records.external_bytes[i], *records.external_keys[i].view(np.uint32)]
        assert (tuple(key), records.tokens[i].any()) == (blocks[0], False)
        root = _core.xxh3_128(names[0])
        assert records.keys[i].tobytes() == _core.xxh3_128(root + block_bytes(blocks[0]))
        return
    assert (records.external_bytes[i], records.external_keys[i].any()) == (0, False)
    assert records.tokens[i].tolist() == tokens_of(blocks[-1:]).tolist()
    keys = _core.chain_keys(names[0], tokens_of(blocks), PAGE_SIZE, extras_of(blocks))
    assert records.keys[i].tobytes() == keys[-1].tobytes()

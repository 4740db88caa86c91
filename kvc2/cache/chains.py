"""Blocks of a namespace as a remote store knows them.

Not here: what the store has of them (fetches.py), the values themselves (tiers/remote/codec.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvc2.answers import Asked
from kvc2.cache.extras import block_digests, prompt_extras
from kvc2.cache.namespaces import Namespace
from kvc2.namespace import of_era
from kvc2.tiers.remote.codec import Chain, Shared


def chain_of(namespace: Namespace, shared: Shared, asked: Asked, blocks: int) -> Chain:
    """The first so many blocks of a prompt, in the namespace's present era: an Invalidate of this
    host begins another one in the store too. Any thread may call it."""
    size = namespace.page_size
    tokens = np.ascontiguousarray(asked.tokens[: blocks * size], np.uint32)
    rows = np.zeros((blocks, 32), np.uint8)
    if asked.extras:
        at, digests = block_digests(asked.extras, size)
        rows[at[at < blocks]] = digests[at < blocks]
    name = _present(namespace, shared)
    return Chain.of(name, tokens, size, prompt_extras(asked.extras, size), rows)


def chain_of_keys(namespace: Namespace, shared: Shared, keys: Sequence[bytes]) -> Chain:
    """The same of opaque keys."""
    return Chain.of_keys(_present(namespace, shared), keys, namespace.page_size)


def _present(namespace: Namespace, shared: Shared) -> bytes:
    return of_era(shared.name, namespace.era)

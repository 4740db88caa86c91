"""Which blocks a call means, as the fields of its message.

Not here: the calls (client.py, admin.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2 import errors
from kvc2.answers import U32, Asked, LeaseCommit, Media
from kvc2.v1 import cache_pb2
from kvc2.wire import packed, to_message


def meant(what: U32 | Asked) -> dict[str, Any]:
    """`tokens`, `keys` and `extras` of a message that has all three."""
    asked = Asked.of(what)
    return {
        "tokens": packed(asked.tokens),
        "keys": asked.keys,
        "extras": extras_of(asked.extras),
    }


def explained(what: U32 | Asked) -> cache_pb2.ExplainRequest:
    """Of a prompt, or of one key. Raises InvalidRequest for several keys."""
    asked = Asked.of(what)
    if not asked.keys:
        return cache_pb2.ExplainRequest(tokens=packed(asked.tokens), extras=extras_of(asked.extras))
    if len(asked.keys) > 1:
        raise errors.InvalidRequest("keys", f"{len(asked.keys)} of them", "one is explained")
    return cache_pb2.ExplainRequest(key=asked.keys[0])


def lease_commit(each: LeaseCommit) -> cache_pb2.LeaseCommit:
    return cache_pb2.LeaseCommit(
        request_id=each.request_id,
        first_block=each.first_block,
        tokens=packed(each.tokens),
        extras=extras_of(each.extras),
        pages=component_pages(each.pages),
    )


def component_pages(pages: NDArray[np.uint32]) -> list[cache_pb2.ComponentPages]:
    """Of component 0."""
    return [cache_pb2.ComponentPages(pages=packed(pages))] if len(pages) else []


def extras_of(given: Sequence[Media]) -> list[cache_pb2.Media]:
    return [to_message(each, cache_pb2.Media) for each in given]

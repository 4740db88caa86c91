"""What the index knows of images and sounds in a prompt: a digest for each block in which some
begin, as kvc2.v1.Media says.

A block's name follows from all before it, so that an image counts once, where it begins. Not here:
what an engine hashes of an image.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from kvc2 import _core
from kvc2.answers import U8, U32, Media

PLACE = struct.Struct("<II")  # in its block, and how many tokens


def prompt_extras(extras: Sequence[Media], page_size: int) -> _core.PromptExtras | None:
    """Of the blocks of a prompt; None: they have none."""
    if not extras:
        return None
    return _core.PromptExtras(*block_digests(extras, page_size))


def block_digests(extras: Sequence[Media], page_size: int) -> tuple[U32, U8]:
    """The blocks [n] that have extras, rising, and their digests [n, 32]."""
    found: dict[int, hashlib._Hash] = {}
    for each in extras:
        block, place = divmod(each.first_token, page_size)
        digest = found.setdefault(block, hashlib.sha256())
        digest.update(PLACE.pack(place, each.num_tokens) + each.digest)
    digests = b"".join(each.digest() for each in found.values())
    return np.array(list(found), np.uint32), np.frombuffer(digests, np.uint8).reshape(-1, 32)

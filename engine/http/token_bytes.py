"""The bytes that each token stands for, which its text alone can't tell: a character may be split
over several tokens.

Not responsible for text as it is generated (engine.text).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

WORD_BEGIN = "▁"  # SentencePiece's space
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's token of one byte


def _byte_level() -> dict[str, int]:
    """The characters that a byte-level vocabulary writes for bytes: printable Latin-1 as itself,
    the others from U+0100 on (GPT-2's bytes_to_unicode)."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


BYTE_LEVEL = _byte_level()


class TokenBytes:
    """Threads may share it. `inner`: the Rust tokenizer, or None; `decode`: text of one token;
    `added`: literals of tokens that are no part of the model's vocabulary."""

    def __init__(self, inner: Any, decode: Callable[[int], str], added: Mapping[int, str]) -> None:
        self._inner = inner
        self._decode = decode
        self._added = added
        how = repr(inner.decoder) if inner is not None and inner.decoder is not None else ""
        self._byte_level = "ByteLevel" in how
        self._word_begin = WORD_BEGIN in how or "Metaspace" in how

    def of(self, token_id: int) -> bytes:
        """Empty for an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._inner.id_to_token(token_id) if self._inner is not None else None
        if token is None:
            return self._decode(token_id).encode()
        if self._byte_level and all(character in BYTE_LEVEL for character in token):
            return bytes(BYTE_LEVEL[character] for character in token)
        if self._word_begin:
            byte = BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(WORD_BEGIN, " ").encode()
        return self._decode(token_id).encode()

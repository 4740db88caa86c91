"""Hides special tokens' literals in what callers wrote, so that they stay text.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands; one message could so forge
turns of others. A hidden literal has a mark in place of its first character. The tokenizer made by
`reader` therefore doesn't find it where it looks for special tokens, and puts the character back
before anything else of it sees the text. Not responsible for which texts are callers' (tokenizer).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable

# Code points that Unicode keeps for a process's own use; no text holds a random row of them.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
NONCE_CHARACTERS = 12


class Literals:
    """The literals of a model's special tokens. Threads may share it."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        found = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        nonce = "".join(secrets.choice(NONCHARACTERS) for _ in range(NONCE_CHARACTERS))
        size = len(NONCHARACTERS)
        self._marks = {
            first: nonce + NONCHARACTERS[index // size] + NONCHARACTERS[index % size]
            for index, first in enumerate(sorted({token[0] for token in found}))
        }
        self._firsts = {mark: first for first, mark in self._marks.items()}
        self._literal = re.compile("|".join(map(re.escape, found)) or "(?!)")
        self._mark = re.compile("|".join(map(re.escape, self._firsts)) or "(?!)")

    def hidden(self, text: str) -> str:
        """The text with each literal hidden, overlapping ones too; the same text if it has none."""
        parts, done = [], 0
        found = self._literal.search(text)
        while found is not None:
            at = found.start()
            parts += [text[done:at], self._marks[text[at]]]
            done = at + 1
            found = self._literal.search(text, done)
        return "".join((*parts, text[done:])) if parts else text

    def hides(self, text: str) -> bool:
        return self._mark.search(text) is not None

    def pieces(self, text: str) -> list[str]:
        """The text cut behind the first character of each hidden literal, to be encoded in pieces
        by a tokenizer that can't put characters back."""
        pieces, done = [], 0
        for mark in self._mark.finditer(text):
            pieces.append(text[done : mark.start()] + self._firsts[mark.group()])
            done = mark.end()
        return [piece for piece in (*pieces, text[done:]) if piece]

    def reader(self, tokenizer_json: str) -> str:
        """The tokenizer.json of one that reads hidden literals as text. Its special tokens are
        looked for in the text as it comes, before it is normalized, since normalizing is what puts
        the characters back."""
        made = json.loads(tokenizer_json)
        for token in made["added_tokens"]:
            token["normalized"] = token["normalized"] and not token["special"]
        back = [
            {"type": "Replace", "pattern": {"String": mark}, "content": first}
            for mark, first in self._firsts.items()
        ]
        own = [made["normalizer"]] if made.get("normalizer") else []
        made["normalizer"] = {"type": "Sequence", "normalizers": [*back, *own]}
        return json.dumps(made)

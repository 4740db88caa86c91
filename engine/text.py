"""Text from tokens as they come, and stop strings, which may span tokens.

Not responsible for tokenizing prompts (http).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from engine.request import Piece

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for an incomplete character
# A byte-level tokenizer completes any character within 4 tokens; beyond that the bytes are simply
# not UTF-8, and holding text back longer would only delay the replacement character.
PENDING_TOKENS_MAX = 6
MARKS = range(0xD800, 0xE000)  # surrogates: no decoded text holds one alone


class IncrementalText:
    """Decodes a growing list of tokens, each character once, in O(1) tokens a step.

    Tokens are decoded together with the few before them, since many tokenizers treat the first
    token of a text differently (a leading space). `special`: literals of the tokens that `decode`
    leaves out; in a stop string they mean the token, as well as the text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        special: Mapping[int, str] = MappingProxyType({}),
        *,
        min_tokens: int = 0,
    ) -> None:
        """`min_tokens`: in the text of fewer no stop string is looked for."""
        self._decode = decode
        stop = [s for s in stop if s]
        stopping = [(i, text) for i, text in special.items() if any(text in s for s in stop)]
        # what stands in `_held` for a special token that a stop string may begin or end with
        self._marks = {i: chr(mark) for (i, _), mark in zip(stopping, MARKS, strict=False)}
        self._unmarked = {ord(mark): None for mark in self._marks.values()}
        marked = stop
        for i, text in sorted(stopping, key=lambda each: len(each[1]), reverse=True):
            if i in self._marks:
                marked = [s.replace(text, self._marks[i]) for s in marked]
        self._stop = dict(zip([*marked, *stop], [*stop, *stop], strict=True))
        self._min_tokens = min_tokens
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text is out
        self._context = 0  # where decoding starts: a few tokens before `_shown`
        self._held = ""  # decoded, but may be the start of a stop string

    def push(self, token_id: int) -> Piece:
        """The text that this token settles; what may yet become a stop string is held back."""
        self._ids.append(token_id)
        mark = self._marks.get(token_id, "")
        self._held += self._settled(last=bool(mark)) + mark
        return self._release()

    def flush(self) -> str:
        """What is still held back, an unfinished character included. Call it once, at the end."""
        self._held += self._settled(last=True)
        piece = self._release()
        text, self._held = piece.text + (self._held if piece.stop is None else ""), ""
        return text.translate(self._unmarked)

    def _settled(self, last: bool) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        whole = self._decode(self._ids[self._context :])
        pending = len(self._ids) - self._shown
        if whole.endswith(REPLACEMENT) and not last and pending < PENDING_TOKENS_MAX:
            return ""
        text = whole[len(before) :]
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def _release(self) -> Piece:
        """Moves text out of `_held`: all up to a stop string, or all that can't begin one."""
        if len(self._ids) < self._min_tokens:
            text, self._held = self._held, ""
            return Piece(text.translate(self._unmarked))
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda each: each[0])  # the first that was given, of equals
            text, self._held = self._held[:at], ""
            return Piece(text.translate(self._unmarked), stop=self._stop[stop])
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return Piece(text.translate(self._unmarked))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

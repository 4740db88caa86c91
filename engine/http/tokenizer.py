"""The model directory's tokenizer and chat template. Threads may share it.

Not responsible for text as it is generated (engine.text).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

# A text of fewer characters a token than this is encoded at once: that takes no longer than some
# texts that fit. A longer one may be spaces, which some vocabularies have by the dozen.
DENSE_CHARACTERS = 8
PIECE_CHARACTERS = 1 << 16  # some 20 ms


class TemplateError(Exception):
    """The model's chat template refuses these messages, or there is none."""


class TextTooLongError(Exception):
    """A text makes more tokens than it may. They were counted as far as that took."""


class Tokenizer:
    """Calls the Rust tokenizer itself where there is one: it takes no lock and keeps no state."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer  # slow to import, and only needed here

        try:
            self._outer: Any = AutoTokenizer.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds for a directory without one
            raise CheckpointError(f"{model_dir} holds no readable tokenizer: {error}") from error
        self._inner: Any = getattr(self._outer, "backend_tokenizer", None)
        if self._inner is not None:  # a prompt is never cut or filled up in silence
            self._inner.no_truncation()
            self._inner.no_padding()
        self.end_token_id: int | None = self._outer.eos_token_id

    def encode(self, text: str, most: int, *, special: bool = True) -> list[int]:
        """Token ids; with the model's begin token where `special`. Takes time for some `most`
        tokens, however long the text is, and lets other threads run meanwhile. Raises
        TextTooLongError for a text that surely makes more; one that makes hardly more is
        encoded."""
        if len(text) > DENSE_CHARACTERS * most:
            self._check_count(text, most)
        return self._encoded(text, special)

    def _check_count(self, text: str, most: int) -> None:
        """Counts tokens piece by piece until there are too many. A cut through a word makes some
        more of it, so that only a clear excess is one."""
        count, surely = 0, most + most // 8 + PIECE_CHARACTERS // 64
        for start in range(0, len(text), PIECE_CHARACTERS):
            count += len(self._encoded(text[start : start + PIECE_CHARACTERS], special=False))
            if count > surely:
                read = min(len(text), start + PIECE_CHARACTERS)
                raise TextTooLongError(
                    f"its first {read} of {len(text)} characters make some {count} tokens, and at "
                    f"most {most} fit this engine"
                )

    def _encoded(self, text: str, special: bool) -> list[int]:
        if self._inner is None:
            return list(self._outer.encode(text, add_special_tokens=special))
        # of a batch, since `encode` holds the interpreter as long as it takes
        (encoding,) = self._inner.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text, without special tokens."""
        if self._inner is not None:
            return str(self._inner.decode(list(token_ids), skip_special_tokens=True))
        return str(self._outer.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """What one token shows in a list of log-probabilities, special ones by name."""
        return str(self._outer.decode([token_id], skip_special_tokens=False))

    def chat(self, messages: Sequence[dict[str, str]], most: int) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks. Raises TemplateError, and
        TextTooLongError as `encode` does."""
        if not self._outer.chat_template:
            raise TemplateError("the model has no chat template; use /v1/completions")
        try:
            text = self._outer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise what they like
            raise TemplateError(f"the model's chat template refuses them: {error}") from error
        return self.encode(text, most, special=False)  # the template writes special tokens itself

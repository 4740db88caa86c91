"""The model directory's tokenizer and chat template. Threads may share it.

Not responsible for text as it is generated (engine.text).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


class TemplateError(Exception):
    """The model's chat template refuses these messages, or there is none."""


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

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; with the model's begin token where `special`."""
        if self._inner is not None:
            ids: list[int] = self._inner.encode(text, add_special_tokens=special).ids
            return ids
        return list(self._outer.encode(text, add_special_tokens=special))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text, without special tokens."""
        if self._inner is not None:
            return str(self._inner.decode(list(token_ids), skip_special_tokens=True))
        return str(self._outer.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """What one token shows in a list of log-probabilities, special ones by name."""
        return str(self._outer.decode([token_id], skip_special_tokens=False))

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks. Raises TemplateError."""
        if not self._outer.chat_template:
            raise TemplateError("the model has no chat template; use /v1/completions")
        try:
            text = self._outer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise what they like
            raise TemplateError(f"the model's chat template refuses them: {error}") from error
        return self.encode(text, special=False)  # the template writes special tokens itself

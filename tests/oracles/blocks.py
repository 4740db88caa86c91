"""A block in the walks: its tokens, and behind them, where it has extras, a number for these."""

import numpy as np

from kvc2 import _core

PAGE_SIZE = 2
Prompt = list[tuple[int, ...]]


def tokens_of(prompt: Prompt) -> np.ndarray:
    return np.array([block[:PAGE_SIZE] for block in prompt], np.uint32).reshape(-1)


def extras_digest(block: tuple[int, ...]) -> bytes:
    """Empty: it has none. A key's block, of many words, has none either."""
    return bytes([7, *block[PAGE_SIZE:]]).ljust(32, b"x") if len(block) == PAGE_SIZE + 1 else b""


def extras_of(prompt: Prompt, first: int = 0) -> _core.PromptExtras | None:
    """Of blocks that are a prompt's from `first` on."""
    known = {first + i: each for i, block in enumerate(prompt) if (each := extras_digest(block))}
    digests = np.frombuffer(b"".join(known.values()), np.uint8).reshape(-1, 32)
    return _core.PromptExtras(np.array(list(known), np.uint32), digests) if known else None


def block_bytes(block: tuple[int, ...]) -> bytes:
    """What is hashed of it."""
    extras = extras_digest(block)
    return np.array(block[:PAGE_SIZE] if extras else block, np.uint32).tobytes() + extras

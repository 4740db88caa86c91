"""What `kvc2 explain` reads and prints: prompts as files of tokens or text, answers as lines.

Not here: what the daemon finds (explain.py) and the command itself (cli.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc2 import _core, errors
from kvc2.client import Asked, Explained, Media
from kvc2.host.paths import user_path

U32 = NDArray[np.uint32]
Decode = Callable[[list[int]], str]

WHY = {
    "nothing": "nothing is missing: every full block before the last token is there",
    "diverged": "the prompt parts from what is cached",
    "hole": "a hole: a fault took this block, and blocks below it are still there",
    "elsewhere": "only the gpu pool of another engine has it",
    "arriving": "its only copy is still on its way",
    "other_namespace": "another namespace of the same tenant has it",
    "evicted": "evicted",
    "invalidated": "its namespace was invalidated",
    "expired": "its time to live was over",
    "lost": "a fault took its last page",
    "session_ended": "its engine's session ended before it was copied",
    "transfer_failed": "its only copy failed on its way",
    "not_admitted": "not admitted",
}


def read(tokens: Path | None, text: Path | None, tokenizer: Any) -> Asked:
    """A prompt from one of two files. Raises InvalidRequest."""
    if (tokens is None) == (text is None):
        raise errors.InvalidRequest("tokens, text", None, "one of them")
    if tokens is not None:
        return read_tokens(tokens)
    assert text is not None
    if tokenizer is None:
        raise errors.InvalidRequest("tokenizer", None, "given with --text")
    return Asked(read_text(text, tokenizer))


def read_tokens(path: Path) -> Asked:
    """Token ids of a file: a JSON list, or numbers between spaces or commas; or a JSON object with
    such a list as `tokens` and, as `extras`, objects of Media's fields, digests in hexadecimal."""
    text = _read(path)
    try:
        told = json.loads(text) if text.lstrip().startswith(("[", "{")) else _numbers(text)
        if not isinstance(told, dict):
            told = {"tokens": told}
        if odd := told.keys() - {"tokens", "extras"}:
            raise errors.InvalidRequest("tokens", sorted(odd), "an object of tokens and extras")
        prompt = np.array([int(value) for value in list(told["tokens"])], np.uint32)
        return Asked(prompt, extras=[_media(**each) for each in told.get("extras", [])])
    except (ValueError, TypeError, OverflowError, KeyError) as error:
        allowed = "token ids: numbers; with extras, a JSON object"
        raise errors.InvalidRequest("tokens", str(path), allowed) from error


def _numbers(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _media(first_token: int, num_tokens: int, digest: str) -> Media:
    place = np.array([int(first_token), int(num_tokens)], np.uint32)
    return Media(int(place[0]), int(place[1]), bytes.fromhex(digest))


def read_text(path: Path, tokenizer: Any) -> U32:
    """The tokens of a text file."""
    return np.array(tokenizer.encode(_read(path)).ids, np.uint32)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizers.Tokenizer of a model's folder. Raises InvalidRequest."""
    folder = user_path("tokenizer", folder)
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except ImportError as error:
        raise errors.InvalidRequest(
            "tokenizer", str(folder), "usable: install the package tokenizers"
        ) from error
    except Exception as error:  # the library raises nothing more exact
        raise errors.InvalidRequest(
            "tokenizer", str(folder), "a folder with tokenizer.json"
        ) from error


def lines(found: Explained, prompt: Asked | None, decode: Decode | None) -> Iterator[str]:
    """The answer for a reader; of the prompt, where it is known."""
    full = (found.tokens - 1) // found.page_size
    ago = f", as it was {age(found.asked_s_ago)} ago" if found.asked_s_ago else ""
    yield f"{found.hit_blocks} of {full} full blocks of {found.page_size} tokens hit{ago}"
    first = 0
    for tier, blocks in found.runs:
        yield f"  blocks {first} to {first + blocks - 1}: {tier}"
        first += blocks
    if first < found.hit_blocks:
        yield f"  blocks {first} to {found.hit_blocks - 1}: in tiers that change often"
    if found.why == "nothing":
        yield f"  {WHY['nothing']}"
        return
    at = found.hit_blocks * found.page_size
    yield f"  block {found.hit_blocks}, from token {at}: {_why(found)}"
    if found.sibling.size:
        yield from _sibling(found, at, None if prompt is None else prompt.tokens, decode)
    if found.other is not None:
        yield f"  namespace {found.other.namespace} has {found.other.hit_tokens} tokens of it"
        for name, ours, theirs in found.other.fields:
            yield f"    {name}: {ours} here, {theirs} there"


def _why(found: Explained) -> str:
    if found.why == "never_seen":
        since = f"never seen since the daemon's start {age(found.uptime_s)} ago"
        lost = found.dead_forgotten
        return f"{since}, or among the {lost} dead blocks that are forgotten" if lost else since
    words = WHY[found.why]
    if found.cause:
        policy = f" by policy {found.policy}" if found.policy else ""
        reason = "" if found.cause == found.why else f": {found.cause.replace('_', ' ')}"
        if found.cause == "not_admitted":
            worths = f"worth {found.worth:.2g} hits a request, its victim {found.victim_worth:.2g}"
            if found.tier == "disk":
                worths += f", of which a disk asks for {_core.DURABLE_MARGIN:g} times"
            words += f"{reason} to {found.tier} {age(found.died_s_ago)} ago: {worths}"
        else:
            words += f"{reason} from {found.tier}{policy} {age(found.died_s_ago)} ago"
    return words


def _sibling(found: Explained, at: int, tokens: U32 | None, decode: Decode | None) -> Iterator[str]:
    if found.sibling_equal == found.page_size:
        yield "  a resident block in its place has the same tokens, and other extras"
        return
    parted = at + found.sibling_equal
    yield f"  the resident block most like it parts from it at token {parted}:"
    sides = [("cached", found.sibling[found.sibling_equal :])]
    if tokens is not None:
        sides.append(("prompt", tokens[parted : at + found.page_size]))
    for name, side in sides:
        ids = [int(token) for token in side]
        shown = repr(decode(ids)) if decode is not None else " ".join(map(str, ids))
        yield f"    {name}: {shown}"


def age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _read(path: Path) -> str:
    try:
        return user_path("file", path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.InvalidRequest("file", str(path), f"readable: {error}") from error

"""Identities of other engines: what their KV depends on is theirs to say, how it lies too.

    {"schema": "foreign/1", "engine": "vllm", "weights": "...", "fields": {"page_size": 16, ...}}

Canonical JSON: keys sorted, no spaces, ASCII (`encode` makes it). Whatever changes a number, or the
place of a byte in a block, must be a field. Not here: identities of our engine (identity.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvc2 import errors
from kvc2.identity import canonical
from kvc2.layout import check_page_size

SCHEMA = "foreign/1"
TEXT_MAX = 256  # letters of engine and weights, and of a field's name
Scalar = str | int | float | bool


@dataclass(frozen=True)
class Foreign:
    """weights: a digest of them, or of what stands for them (a revision): any text that changes
    when they do. fields: by name; `page_size`, the tokens of a block, must be among them. Raises
    InvalidRequest."""

    engine: str
    weights: str
    fields: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_text("identity.engine", self.engine)
        _check_text("identity.weights", self.weights)
        for name, value in self.fields.items():
            _check_text("identity.fields", name)
            _check_scalar(f"identity.fields.{name}", value)
        if type(self.fields.get("page_size")) is not int:
            shown = self.fields.get("page_size")
            raise errors.InvalidRequest("identity.fields.page_size", shown, "tokens of a block")
        check_page_size("identity.fields.page_size", self.page_size)

    @property
    def page_size(self) -> int:
        found = self.fields["page_size"]
        assert isinstance(found, int)
        return found

    def encode(self) -> bytes:
        """Canonical JSON. Equal identities, equal bytes."""
        named = {"engine": self.engine, "weights": self.weights, "fields": dict(self.fields)}
        return canonical({"schema": SCHEMA, **named})


def of_values(values: Mapping[str, object]) -> Foreign:
    """The identity of a decoded JSON object, its schema left out. Raises InvalidRequest."""
    known = ("engine", "weights", "fields")
    for name in sorted(values.keys() ^ set(known)):
        what = f"unknown to {SCHEMA}, which has {', '.join(known)}; put it into fields"
        allowed = "missing" if name in known else what
        raise errors.InvalidRequest(f"identity.{name}", values.get(name), allowed)
    engine, weights, given = values["engine"], values["weights"], values["fields"]
    if not isinstance(engine, str):
        raise errors.InvalidRequest("identity.engine", engine, "a text")
    if not isinstance(weights, str):
        raise errors.InvalidRequest("identity.weights", weights, "a text")
    if not isinstance(given, dict):
        raise errors.InvalidRequest("identity.fields", given, "an object")
    return Foreign(engine, weights, given)


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str) or not 1 <= len(text) <= TEXT_MAX:
        raise errors.InvalidRequest(name, text, f"a text of 1 to {TEXT_MAX} letters")


def _check_scalar(name: str, value: object) -> None:
    if isinstance(value, str | bool):
        return
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return
    if isinstance(value, float) and math.isfinite(value):
        return
    raise errors.InvalidRequest(name, value, "a text, a number, true or false")

"""The rule of fields: which of a body's members count, and what becomes of the others.

A field that OpenAI has and that changes no answer is taken and ignored (`Ignored`). One that would
change it and isn't done is refused by name (`NotDone`), unless its value asks for nothing: what is
null or empty does. An unknown one is ignored, and told once in the log; with --strict-fields it is
refused. Not responsible for any single field (schema, dialects).

Lists are checked up to the first bad element, and few unknown names are kept: see bodies.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

log = logging.getLogger(__name__)

EMPTY: tuple[Any, ...] = (None, "", [], {})
UNKNOWN_MAX = 16  # names kept of one body
TOLD_MAX = 256  # names told in the log, of all bodies
NAME_CHARACTERS_MAX = 80


@dataclass
class Unknown:
    """What a body's check is told, and what it found: names that no field has."""

    refused: bool = False
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        if len(self.names) < UNKNOWN_MAX:
            self.names.append(name[:NAME_CHARACTERS_MAX])


class Told:
    """Unknown names, each told in the log once as long as there are few. Threads may share it."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def tell(self, names: list[str]) -> None:
        for name in names:
            if name not in self._names and len(self._names) < TOLD_MAX:
                self._names.add(name)
                log.warning("field %r of a request is unknown, and is ignored", name)


def few(most: int) -> BeforeValidator:
    """Refuses an object or list of more than `most` before it looks at any."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(f"at most {most}")
        return value

    return BeforeValidator(check)


def _not_done(value: Any) -> Any:
    if value in EMPTY or value is False:
        return None
    raise ValueError("this engine doesn't do it; leave it out")


Ignored = Any  # changes no answer
ASKS_FOR_NOTHING: Any = {"enum": [None, "", [], {}, False]}
NotDone = Annotated[  # would change the answer
    Any, BeforeValidator(_not_done), WithJsonSchema(ASKS_FOR_NOTHING)
]


class Strict(BaseModel):
    """No coercion ("5" is no number) and no NaN; members that ask for nothing are left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ours: ClassVar[bool] = False  # an unknown name is refused in any case

    @model_validator(mode="before")
    @classmethod
    def _what_asks_for_something(cls, value: Any, info: ValidationInfo) -> Any:
        """Without members that ask for nothing, and at most one unknown name, to be refused."""
        if not isinstance(value, dict):
            return value
        unknown: Unknown = (info.context or {}).get("unknown") or Unknown()
        asked: dict[str, Any] = {}
        refused: dict[str, Any] = {}
        known = _names(cls)
        for name, each in value.items():
            required = known.get(name)
            if required is None:
                if each in EMPTY:
                    continue
                if not (cls.ours or unknown.refused):
                    unknown.add(name)
                elif not refused:
                    refused[name] = each
            elif each is not None or required:
                asked[name] = each
        return asked | refused


def _names(kind: type[BaseModel]) -> dict[str, bool]:
    """By the name that a body has for it: whether the field must be there."""
    return {field.alias or name: field.is_required() for name, field in kind.model_fields.items()}

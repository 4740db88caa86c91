"""Plain values to the wire's messages and back, by the names and types of their fields.

A dataclass or named tuple stands for a message that has the same field names. bytes of the message
are, by the type of the field: an array, little-endian and without a copy; a str, in hexadecimal;
bytes as they are. None is a message that is not set. Not here: what the values mean (answers.py),
nor whether they are allowed (server/checks.py).
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray

M = TypeVar("M", bound=Message)
V = TypeVar("V")
Convert = Callable[[Any], Any]
Put = Callable[[Any, Any], None]


class _Field(NamedTuple):
    """One field of a kind of value: what puts it into its message (None: a number, set as it is),
    and what makes it of the message's (None: taken as it is). `optional`: it is a message that may
    not be set."""

    name: str
    put: Put | None
    unpack: Convert | None
    optional: bool = False


def packed(array: NDArray[np.uint32]) -> bytes:
    """A u32 array as the wire has it. Lists and other integer dtypes are converted."""
    return np.ascontiguousarray(array, dtype="<u4").tobytes()


def unpacked(data: bytes) -> NDArray[np.uint32]:
    """The u32 array of a message: read-only, a view."""
    return np.frombuffer(data, dtype="<u4")


def to_message(value: object, kind: type[M]) -> M:
    """The message of a value, which has all of its fields. What else the value has stays here."""
    message = kind()
    _fill(message, value)
    return message


def _fill(message: Message, value: object) -> None:
    """In place: messages within others are not copied. What is 0 or empty need not be said."""
    for name, put, _, _ in _fields(type(value), type(message)):
        item = getattr(value, name)
        if put is not None:
            put(message, item)
        elif item:
            setattr(message, name, item)


def from_message(kind: type[V], message: Message) -> V:
    """The value of a message; arrays are views of it."""
    found: dict[str, Any] = {}
    for name, _, unpack, optional in _fields(kind, type(message)):
        if optional and not message.HasField(name):
            found[name] = None
        else:
            item = getattr(message, name)
            found[name] = item if unpack is None else unpack(item)
    return kind(**found)


def _fields_of(value: Any, message: Any) -> tuple[_Field, ...]:
    """Of two classes. Raises KeyError when the message has a field that the value lacks."""
    hints = typing.get_type_hints(value)
    return tuple(_field(each, hints[each.name]) for each in message.DESCRIPTOR.fields)


_fields: Callable[[Any, Any], tuple[_Field, ...]] = functools.cache(_fields_of)


def _field(field: Any, hint: Any) -> _Field:
    name, inside, container = field.name, typing.get_args(hint), typing.get_origin(hint)
    if isinstance(hint, types.UnionType):
        return _Field(name, _optional(_put(field)), _unpack(field, inside[0]), True)
    if container is dict:
        entry = field.message_type.fields_by_name["value"]
        unpack = _unpack(entry, inside[1])
        return _Field(
            name, _put_each_named(field, entry), lambda of: {k: unpack(v) for k, v in of.items()}
        )
    if container in (list, tuple):
        unpack = _unpack(field, inside[0])
        put = _put_each(field, _pack(field, inside[0]))
        return _Field(name, put, lambda of: container(unpack(each) for each in of))
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return _Field(name, _put(field), _unpack(field, hint))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _Field(name, _put_bytes(field, _pack(field, hint)), _unpack(field, hint))
    if field.has_presence:
        return _Field(name, lambda message, item: setattr(message, name, item), None)
    return _Field(name, None, None)


def _put(field: Any) -> Put:
    name = field.name

    def put(message: Any, item: Any) -> None:
        inner = getattr(message, name)
        inner.SetInParent()
        _fill(inner, item)

    return put


def _optional(put: Put) -> Put:
    return lambda message, item: None if item is None else put(message, item)


def _put_bytes(field: Any, pack: Convert) -> Put:
    name, presence = field.name, field.has_presence

    def put(message: Any, item: Any) -> None:
        if len(item) or presence:
            setattr(message, name, pack(item))

    return put


def _put_each(field: Any, pack: Convert) -> Put:
    name, inner = field.name, field.type == FieldDescriptor.TYPE_MESSAGE

    def put(message: Any, items: Any) -> None:
        for each in items:
            if inner:
                _fill(getattr(message, name).add(), each)
            else:
                getattr(message, name).append(pack(each))

    return put


def _put_each_named(field: Any, entry: Any) -> Put:
    name, inner = field.name, entry.type == FieldDescriptor.TYPE_MESSAGE

    def put(message: Any, items: Any) -> None:
        found = getattr(message, name)
        for key, each in items.items():
            if inner:
                _fill(found[key], each)
            else:
                found[key] = each

    return put


def _pack(field: Any, hint: Any) -> Convert:
    """Of one element, into its message: bytes of an array, or of a str in hexadecimal."""
    if field.type != FieldDescriptor.TYPE_BYTES or hint is bytes:
        return _same
    if hint is str:
        return bytes.fromhex
    dtype = _dtype(hint)
    return lambda array: np.ascontiguousarray(array, dtype).tobytes()


def _unpack(field: Any, hint: Any) -> Convert:
    """Of one element, out of its message."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return lambda message: from_message(hint, message)
    if field.type != FieldDescriptor.TYPE_BYTES or hint is bytes:
        return _same
    if hint is str:
        return bytes.hex
    dtype = _dtype(hint)
    return lambda data: np.frombuffer(data, dtype)


def _dtype(hint: Any) -> np.dtype[Any]:
    """Of an NDArray's type, as the wire has it."""
    kind: type[np.generic] = typing.get_args(typing.get_args(hint)[1])[0]
    return np.dtype(kind).newbyteorder("<")


def _same(value: Any) -> Any:
    return value

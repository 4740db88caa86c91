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
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray
from typing_extensions import Buffer

M = TypeVar("M", bound=Message)
V = TypeVar("V")
Convert = Callable[[Any], Any]
SIZED = (np.ndarray, tuple, list, dict, str, bytes)


class _Field(NamedTuple):
    """One field of a kind of value: how it gets into its message, and out of it; None: as it is.
    `optional`: it is a message that may not be set."""

    name: str
    pack: Convert | None
    unpack: Convert | None
    optional: bool = False


def packed(array: NDArray[np.uint32]) -> bytes:
    """A u32 array as the wire has it. Lists and other integer dtypes are converted."""
    return np.ascontiguousarray(array, dtype="<u4").tobytes()


def unpacked(data: bytes) -> NDArray[np.uint32]:
    """The u32 array of a message: read-only, a view."""
    return np.frombuffer(data, dtype="<u4")


def with_payload(message: Message, name: str, payload: Buffer) -> bytes:
    """The message as bytes, whose bytes field `name` is the payload: a message is its fields one
    after the other, so that this one is copied once and not three times."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    view = memoryview(payload)
    head = message.SerializeToString()
    return b"".join((head, varint(number << 3 | 2), varint(view.nbytes), view))


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def to_message(value: object, kind: type[M]) -> M:
    """The message of a value, which has all of its fields. What else the value has stays here."""
    found: dict[str, Any] = {}
    for name, pack, _, _ in _fields(type(value), kind):
        item = getattr(value, name)
        if pack is None:
            found[name] = item
        elif not (isinstance(item, SIZED) and len(item) == 0):  # what is empty need not be said
            found[name] = pack(item)
    return kind(**found)


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
    inside, container = typing.get_args(hint), typing.get_origin(hint)
    if isinstance(hint, types.UnionType):
        pack, unpack = _one(field, inside[0])
        return _Field(field.name, lambda each: None if each is None else pack(each), unpack, True)
    if container is dict:
        pack, unpack = _one(field.message_type.fields_by_name["value"], inside[1])
        return _Field(field.name, _mapped(pack), _mapped(unpack))
    if container in (list, tuple):
        pack, unpack = _one(field, inside[0])
        return _Field(field.name, _each(list, pack), _each(container, unpack))
    if field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_BYTES):
        return _Field(field.name, *_one(field, hint))
    return _Field(field.name, None, None)


def _one(field: Any, hint: Any) -> tuple[Convert, Convert]:
    """Of one element: into a message, and out of it."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        kind = message_factory.GetMessageClass(field.message_type)
        return lambda value: to_message(value, kind), lambda message: from_message(hint, message)
    if field.type != FieldDescriptor.TYPE_BYTES or hint is bytes:
        return _same, _same
    if hint is str:
        return bytes.fromhex, bytes.hex
    dtype = np.dtype(typing.get_args(typing.get_args(hint)[1])[0]).newbyteorder("<")
    return (
        lambda array: np.ascontiguousarray(array, dtype).tobytes(),
        lambda data: np.frombuffer(data, dtype),
    )


def _mapped(convert: Convert) -> Convert:
    return lambda values: {key: convert(each) for key, each in values.items()}


def _each(container: Any, convert: Convert) -> Convert:
    return lambda values: container(convert(each) for each in values)


def _same(value: Any) -> Any:
    return value

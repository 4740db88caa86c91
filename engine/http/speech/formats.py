"""How models write calls of tools: a table of formats, and which one a model's template shows.

Each format reads what its models were trained to write (the shapes are public: the models' chat
templates). Not responsible for reading as such (reader), nor for reasoning before it (reasoning).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.http.speech.reader import Out, Reader, Steps, Tools, drop

Read = Callable[[Reader, Tools], Steps[None]]
NAMES, ARGUMENTS = ("name",), ("arguments", "parameters")
HEAD_MAX = 256  # characters of a tool's name with what is beside it


@dataclass(frozen=True)
class Format:
    """`marks`: what begins calls; a text without one has none. `shown_by`: what a template of such
    a model holds. `tokens`: what it writes that may be a special token. `call_id_letters`: of ids
    that we make, where the template wants so many."""

    name: str
    read: Read
    marks: tuple[str, ...]
    shown_by: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    call_id_letters: int | None = None


def prose(reader: Reader, tools: Tools) -> Steps[None]:
    yield from reader.until((), reader.text)


def hermes(reader: Reader, tools: Tools) -> Steps[None]:
    """<tool_call>{"name": NAME, "arguments": {...}}</tool_call>, once for each call."""
    while (mark := (yield from reader.until(("<tool_call>",), reader.text))) is not None:
        reader.begin(mark)
        if (yield from _object(reader)):
            yield from reader.spaces()
            yield from reader.next(("</tool_call>",))
        else:
            reader.give_up()


def array(reader: Reader, tools: Tools) -> Steps[None]:
    """[{"name": NAME, "arguments": {...}}, ...]: what a grammar of ours makes a model write."""
    reader.begin("")
    yield from reader.spaces()
    if (yield from reader.next(("[",))) is None or not (yield from _objects(reader)):
        reader.give_up()
        yield from reader.until((), reader.text)
    yield from reader.until((), drop)


def qwen3_coder(reader: Reader, tools: Tools) -> Steps[None]:
    """<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>."""
    marks = ("<tool_call>", "<function=")
    while (mark := (yield from reader.until(marks, reader.text))) is not None:
        reader.begin(mark)
        if mark == "<tool_call>":
            yield from reader.spaces()
            mark = yield from reader.next(("<function=",))
        name = None if mark is None else (yield from _head(reader, ">"))
        if name is None:
            reader.give_up()
            continue
        members = _Members(reader, tools, name)
        while True:
            yield from reader.spaces()
            if (yield from reader.next(("<parameter=",))) is None:
                break
            key, _ = yield from reader.find((">",))
            value, _ = yield from reader.find(("</parameter>",))
            members.add(key.strip(), _without_line_ends(value))
        members.end()
        yield from reader.next(("</function>",))
        yield from reader.spaces()
        yield from reader.next(("</tool_call>",))


def glm(reader: Reader, tools: Tools) -> Steps[None]:
    """<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>."""
    while (mark := (yield from reader.until(("<tool_call>",), reader.text))) is not None:
        reader.begin(mark)
        head, end = yield from reader.find(("<arg_key>", "</tool_call>"))
        name = head.strip()
        if end is None or not _is_name(name):
            reader.give_up()
            continue
        members = _Members(reader, tools, name)
        while end == "<arg_key>":
            key, _ = yield from reader.find(("</arg_key>",))
            yield from reader.spaces()
            yield from reader.next(("<arg_value>",))
            value, _ = yield from reader.find(("</arg_value>",))
            members.add(key.strip(), value)
            yield from reader.spaces()
            end = yield from reader.next(("<arg_key>", "</tool_call>"))
        members.end()


def _invokes(prefix: str, mark: str, end: str) -> Read:
    """MARK <invoke name="NAME"><parameter name="KEY">VALUE</parameter>...</invoke>... END, each
    tag with a prefix."""

    def read(reader: Reader, tools: Tools) -> Steps[None]:
        while (found := (yield from reader.until((mark,), reader.text))) is not None:
            reader.begin(found)
            before = reader.calls
            while True:
                yield from reader.spaces()
                if (yield from reader.next((f"<{prefix}invoke",))) is None:
                    break
                name = _attribute((yield from reader.find((">",)))[0])
                if not _is_name(name):
                    break
                yield from _parameters(reader, _Members(reader, tools, name), prefix)
            if reader.calls == before:
                reader.give_up()
            yield from reader.next((end,))

    return read


def _parameters(reader: Reader, members: _Members, prefix: str) -> Steps[None]:
    while True:
        yield from reader.spaces()
        if (yield from reader.next((f"<{prefix}parameter",))) is None:
            break
        tag, _ = yield from reader.find((">",))
        value, _ = yield from reader.find((f"</{prefix}parameter>",))
        members.add(_attribute(tag), _without_line_ends(value))
    members.end()
    yield from reader.next((f"</{prefix}invoke>",))


def mistral(reader: Reader, tools: Tools) -> Steps[None]:
    """[TOOL_CALLS] and an array of calls, or [TOOL_CALLS]NAME[ARGS]{...} once for each."""
    while (mark := (yield from reader.until(("[TOOL_CALLS]",), reader.text))) is not None:
        reader.begin(mark)
        yield from reader.spaces()
        if (yield from reader.next(("[",))) is not None:
            if not (yield from _objects(reader)):
                reader.give_up()
            continue
        head, end = yield from reader.find(("[CALL_ID]", "[ARGS]"))
        call_id = None
        if end == "[CALL_ID]":
            call_id, end = yield from reader.find(("[ARGS]",))
        if end is None or not _is_name(head.strip()):
            reader.give_up()
            continue
        yield from _arguments(reader, reader.call(head.strip(), call_id))


def deepseek(reader: Reader, tools: Tools) -> Steps[None]:
    """<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>, in V3 and R1 with `function`
    in the name's place, and name and fenced JSON behind it."""
    marks = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
    while (mark := (yield from reader.until(marks, reader.text))) is not None:
        reader.begin(mark)
        if mark == marks[0]:
            yield from reader.spaces()
            mark = yield from reader.next(marks[1:])
        name = None if mark is None else (yield from _head(reader, "<｜tool▁sep｜>"))
        if name == "function":
            name = yield from _head(reader, "\n")
            yield from reader.spaces()
            yield from reader.next(("```json",))
        if name is None:
            reader.give_up()
            continue
        yield from _arguments(reader, reader.call(name))
        yield from reader.find(("<｜tool▁call▁end｜>",))
        yield from reader.spaces()
        yield from reader.next(("<｜tool▁calls▁end｜>",))


def kimi(reader: Reader, tools: Tools) -> Steps[None]:
    """<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{...}<|tool_call_end|>,
    all calls in a section."""
    marks = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    while (mark := (yield from reader.until(marks, reader.text))) is not None:
        reader.begin(mark)
        if mark == marks[0]:
            yield from reader.spaces()
            mark = yield from reader.next(marks[1:])
        call_id, end = "", None
        if mark is not None:
            call_id, end = yield from reader.find(("<|tool_call_argument_begin|>",))
        name = call_id.strip().removeprefix("functions.").rsplit(":", 1)[0]
        if end is None or not _is_name(name):
            reader.give_up()
            continue
        yield from _arguments(reader, reader.call(name, call_id.strip()))
        yield from reader.spaces()
        yield from reader.next(("<|tool_call_end|>",))
        yield from reader.spaces()
        yield from reader.next(("<|tool_calls_section_end|>",))


def harmony(reader: Reader, tools: Tools) -> Steps[None]:
    """gpt-oss: messages of channels, <|channel|>CHANNEL to=functions.NAME<|message|>TEXT<|end|>.
    What is said in `analysis` is reasoning."""
    ends = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
    while True:
        reader.begin("")
        head, mark = yield from reader.find(("<|message|>",))
        if mark is None:
            reader.give_up()
            return
        to = head.partition("to=functions.")[2].split("<|")[0].split()
        out: Out = reader.text
        if to:
            out = reader.call(to[0])
        elif "analysis" in head:
            out = reader.reasoning
        yield from reader.until(ends, out)


FORMATS = (
    Format(
        "kimi",
        kimi,
        ("<|tool_calls_section_begin|>",),
        ("<|tool_call_argument_begin|>",),
        (
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
    ),
    Format(
        "deepseek-v3.2",
        _invokes("｜DSML｜", "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        ("<｜DSML｜function_calls>",),
        ("｜DSML｜",),
        ("｜DSML｜",),
    ),
    Format(
        "deepseek",
        deepseek,
        ("<｜tool▁calls▁begin｜>",),
        ("<｜tool▁call▁begin｜>",),
        (
            *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        ),
    ),
    Format(
        "minimax",
        _invokes("", "<minimax:tool_call>", "</minimax:tool_call>"),
        ("<minimax:tool_call>",),
        ("minimax:tool_call",),
        ("<minimax:tool_call>", "</minimax:tool_call>"),
    ),
    Format(
        "harmony",
        harmony,
        ("<|channel|>",),
        ("<|channel|>",),
        (
            *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"),
            *("<|end|>", "<|call|>", "<|return|>"),
        ),
    ),
    Format(
        "mistral",
        mistral,
        ("[TOOL_CALLS]",),
        ("[TOOL_CALLS]",),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        call_id_letters=9,
    ),
    Format(
        "glm",
        glm,
        ("<tool_call>",),
        ("<arg_key>",),
        (
            *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
            *("<arg_value>", "</arg_value>"),
        ),
    ),
    Format(
        "qwen3-coder",
        qwen3_coder,
        ("<tool_call>", "<function="),
        ("<function=",),
        ("<tool_call>", "</tool_call>"),
    ),
    Format("hermes", hermes, ("<tool_call>",), ("<tool_call>",), ("<tool_call>", "</tool_call>")),
)
BY_NAME = {each.name: each for each in FORMATS}
ARRAY = Format("array", array, ("[",))
PROSE = Format("prose", prose, ())


def shown_by(template: str) -> Format | None:
    """The format that a chat template shows to its model; None: it shows none that we know."""
    return next((f for f in FORMATS if any(sign in template for sign in f.shown_by)), None)


# what formats have in common


class _Members:
    """The arguments of a call, an object that grows by one member at a time."""

    def __init__(self, reader: Reader, tools: Tools, name: str) -> None:
        self._out = reader.call(name)
        self._tools, self._name = tools, name
        self._count = 0

    def add(self, key: str, text: str) -> None:
        before = ", " if self._count else "{"
        value = self._tools.value(self._name, key, text)
        self._out(f"{before}{json.dumps(key, ensure_ascii=False)}: {value}")
        self._count += 1

    def end(self) -> None:
        self._out("}" if self._count else "{}")


def _objects(reader: Reader) -> Steps[bool]:
    """Calls of an array whose bracket is read; whether there was one."""
    found = False
    while True:
        yield from reader.spaces()
        if (yield from reader.next(("]",))) is not None:
            return found
        if not (yield from _object(reader)):
            return found
        found = True
        yield from reader.spaces()
        yield from reader.next((",",))


def _object(reader: Reader) -> Steps[bool]:
    """{"name": NAME, "arguments": {...}}, in any order, beside other members; whether it was one.
    Arguments behind the name go out as they come."""
    yield from reader.spaces()
    if (yield from reader.next(("{",))) is None:
        return False
    call: Out | None = None
    name, early, told = None, "{}", False
    while True:
        yield from reader.spaces()
        if (yield from reader.next(("}",))) is not None:
            break
        key = yield from _json(reader)
        yield from reader.spaces()
        if not isinstance(key, str) or (yield from reader.next((":",))) is None:
            break
        yield from reader.spaces()
        if key in ARGUMENTS and call is not None and not told:
            yield from _arguments(reader, call)
            told = True
        elif key in ARGUMENTS and not told:
            value = yield from _json(reader)
            early = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        else:
            value = yield from _json(reader)
            if key in NAMES and isinstance(value, str) and _is_name(value) and name is None:
                name = value
                call = reader.call(name) if early == "{}" else None
        yield from reader.spaces()
        yield from reader.next((",",))
    if name is None:
        return False
    if not told:
        (call or reader.call(name))(early)
    return True


def _arguments(reader: Reader, out: Out) -> Steps[None]:
    """The value that arguments are, as it comes. Some models write it as a string of JSON."""
    yield from reader.spaces()
    if (yield from reader.next(('"',))) is None:
        yield from reader.value(out)
        return
    parts = ['"']
    while True:
        text, mark = yield from reader.find(('"',))
        parts += [text, '"']
        ended = (len(text) - len(text.rstrip("\\"))) % 2 == 0
        if mark is None or ended:
            break
    try:
        out(str(json.loads("".join(parts))))
    except ValueError:
        out("".join(parts))


def _json(reader: Reader) -> Steps[Any]:
    """One whole JSON value; None also for what is none."""
    parts: list[str] = []
    yield from reader.value(parts.append)
    try:
        return json.loads("".join(parts))
    except (ValueError, RecursionError):
        return None


def _head(reader: Reader, mark: str) -> Steps[str | None]:
    """A tool's name up to a mark; None: there is none."""
    text, end = yield from reader.find((mark,))
    return text.strip() if end is not None and _is_name(text.strip()) else None


def _is_name(text: str) -> bool:
    return 0 < len(text) <= HEAD_MAX and not any(c.isspace() or c in "<>{}\"'" for c in text)


def _attribute(tag: str) -> str:
    """The name of a tag: name="NAME", with quotes or without."""
    return tag.partition("name=")[2].strip().split(" string=")[0].strip().strip("\"'")


def _without_line_ends(text: str) -> str:
    return text.removeprefix("\n").removesuffix("\n")

"""What a model writes is said the same however it is cut into pieces; what is no call is text."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.http.speech import formats
from engine.http.speech.formats import ARRAY, BY_NAME, FORMATS, PROSE, Format, shown_by
from engine.http.speech.reader import Reader, Tools
from engine.http.speech.reasoning import Marks, marks_of, speech

TOOLS = Tools(
    {
        "weather": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "where": {"type": ["string", "null"]},
                "options": {"type": "object"},
            },
        },
        "now": {},
    }
)
THINK = Marks("<think>", "</think>")


@dataclass
class Heard:
    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)


def hear(reader: Reader, pieces: list[str]) -> Heard:
    heard = Heard()
    for said in [*(reader.push(piece) for piece in pieces), reader.flush()]:
        heard.text += said.text
        heard.reasoning += said.reasoning
        for each in said.calls:
            if each.name is not None:
                assert each.index == len(heard.calls)
                heard.calls.append((each.name, ""))
                heard.ids.append(each.call_id)
            name, arguments = heard.calls[each.index]
            heard.calls[each.index] = (name, arguments + each.arguments)
    return heard


def read(form: Format, text: str, *, marks: Marks | None = None, inside: bool = False) -> Heard:
    """Cut at each place, and all at once: the same is heard."""
    whole = hear(speech(form, TOOLS, marks, inside=inside), [text])
    assert hear(speech(form, TOOLS, marks, inside=inside), list(text)) == whole
    for at in range(len(text)):
        cut = hear(speech(form, TOOLS, marks, inside=inside), [text[:at], text[at:]])
        assert cut == whole, at
    return whole


PARIS = {"city": "Paris", "days": 3}
DSML = "｜DSML｜"
CALLS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n'
        '</tool_call>\n<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
        "I look.",
        [("weather", PARIS), ("now", {})],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"a\\\\\\"b\\"}"}</tool_call>',
        "",
        [("weather", {"city": 'a"b'})],
    ),
    (
        "hermes",  # brackets and the end's mark inside of a string, and no end's mark
        '<tool_call>{"id": 3, "name": "weather", "arguments": {"city": "</tool_call>}{\\""}}',
        "",
        [("weather", {"city": '</tool_call>}{"'})],
    ),
    (
        "qwen3-coder",
        "Now.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\nLyon\n</parameter>\n"
        '<parameter=days>\n3\n</parameter>\n<parameter=options>\n{"a": [1]}\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "Now.",
        [("weather", {"city": "Paris\nLyon", "days": 3, "options": {"a": [1]}}), ("now", {})],
    ),
    (
        "qwen3-coder",
        "<function=weather><parameter=city>12</parameter><parameter=x>not json</parameter>"
        "<parameter=where>null</parameter></function>",
        "",
        [("weather", {"city": "12", "x": "not json", "where": "null"})],
    ),
    (
        "glm",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call><tool_call>now</tool_call>",
        "",
        [("weather", PARIS), ("now", {})],
    ),
    (
        "minimax",
        'Well.<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris'
        '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n'
        "</minimax:tool_call>",
        "Well.",
        [("weather", PARIS), ("now", {})],
    ),
    (
        "deepseek-v3.2",
        f'<{DSML}function_calls>\n<{DSML}invoke name="weather">\n'
        f'<{DSML}parameter name="city" string="true">Paris</{DSML}parameter>\n'
        f'<{DSML}parameter name="days" string="false">3</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}function_calls>",
        "",
        [("weather", PARIS)],
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
        "<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [("weather", PARIS), ("now", {})],
    ),
    (
        "deepseek",
        'Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris", '
        '"days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "Hm.",
        [("weather", PARIS)],
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}, '
        '{"name": "now", "arguments": {}, "id": "123456789"}]',
        "",
        [("weather", PARIS), ("now", {})],
    ),
    (
        "mistral",
        'I see.[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]now[CALL_ID]'
        "123456789[ARGS]{}",
        "I see.",
        [("weather", PARIS), ("now", {})],
    ),
    (
        "kimi",
        "So.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris", "days": 3}<|tool_call_end|>'
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "So.",
        [("weather", PARIS), ("now", {})],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}<|call|>',
        "",
        [("weather", PARIS)],
    ),
    (
        "harmony",
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|end|>"
        "<|channel|>final<|message|>Done.<|return|>",
        "Done.",
        [("now", {})],
    ),
]


@pytest.mark.parametrize(("name", "text", "prose", "calls"), CALLS)
def test_calls_are_read(name: str, text: str, prose: str, calls: list[tuple[str, Any]]) -> None:
    heard = read(BY_NAME[name], text)
    assert heard.text == prose
    assert [(name, json.loads(arguments)) for name, arguments in heard.calls] == calls


def test_what_a_grammar_of_ours_makes_is_read() -> None:
    calls = [{"name": "weather", "arguments": PARIS}, {"name": "now", "arguments": {}}]
    heard = read(ARRAY, json.dumps(calls) + " ")
    assert [(n, json.loads(a)) for n, a in heard.calls] == [("weather", PARIS), ("now", {})]
    assert heard.text == ""


NO_CALLS = ["", " ", "Hi. ", " a < b <", "<tool", "[TOOL_", "<|chan", "}{", "\n\n"]


@pytest.mark.parametrize("form", [*FORMATS, PROSE], ids=lambda form: form.name)
@pytest.mark.parametrize(
    "text", ["", " ", "Hi. ", " a < b <", "<tool", "[TOOL_", "<|chan", "}{", "\n\n"]
)
def test_what_calls_nothing_is_text_to_the_letter(form: Format, text: str) -> None:
    heard = read(form, text)
    assert (heard.text, heard.calls) == (text, [])


BROKEN = [
    ("hermes", "<tool_call>what?</tool_call>"),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a b"}</tool_call>'),
    ("hermes", '<tool_call>{"na'),
    ("array", "no array"),
    ("array", "[1, 2]"),
    ("qwen3-coder", "<tool_call>\nno function</tool_call>"),
    ("qwen3-coder", "<function="),
    ("glm", "<tool_call>two words</tool_call>"),
    ("minimax", "<minimax:tool_call>hm</minimax:tool_call>"),
    ("mistral", "[TOOL_CALLS]weather {}"),
    ("mistral", "[TOOL_CALLS][]"),
    ("deepseek", "<｜tool▁calls▁begin｜>hm"),
    ("kimi", "<|tool_call_begin|>functions.now:0"),
    ("harmony", "plain text"),
]


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_what_can_not_be_read_is_text(name: str, text: str) -> None:
    heard = read(ARRAY if name == "array" else BY_NAME[name], text)
    assert (heard.text, heard.calls) == (text, [])


def test_a_call_that_is_cut_off_is_told_as_far_as_it_came() -> None:
    heard = read(BY_NAME["hermes"], '<tool_call>{"name": "weather", "arguments": {"city": "Pa')
    assert heard.calls == [("weather", '{"city": "Pa')]
    assert heard.text == ""


def test_arguments_are_told_as_they_come() -> None:
    reader = speech(BY_NAME["hermes"], TOOLS, None, inside=False)
    reader.push('<tool_call>{"name": "weather", "arguments": {"city": ')
    assert [each.arguments for each in reader.push('"Par').calls] == ['"Par']


def test_text_between_and_behind_calls_is_kept() -> None:
    call = '<tool_call>{"name": "now"}</tool_call>'
    heard = read(BY_NAME["hermes"], f"a b\n{call}\n c d {call} e ")
    assert heard.text == "a bc de"
    assert len(heard.calls) == 2


def test_without_parallel_calls_the_first_is_told() -> None:
    call = '<tool_call>{"name": "now"}</tool_call>'
    reader = speech(BY_NAME["hermes"], Tools(parallel=False), None, inside=False)
    assert len(hear(reader, [call * 3]).calls) == 1


def test_a_models_own_ids_are_told() -> None:
    text = "<|tool_call_begin|>functions.now:7<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert read(BY_NAME["kimi"], text).ids == ["functions.now:7"]


# reasoning


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "prose"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, "hm\n", "yes"),
        ("\n<think>hm</think>yes", False, "hm", "yes"),
        ("hm</think>\nyes", True, "hm", "yes"),
        ("hm", True, "hm", ""),
        ("no <think>hm</think>", False, "", "no <think>hm</think>"),
        ("  yes", False, "", "  yes"),
        ("<think></think>yes", False, "", "yes"),
        ("<thin", False, "", "<thin"),
    ],
)
def test_reasoning_is_told_apart(text: str, inside: bool, reasoning: str, prose: str) -> None:
    heard = read(PROSE, text, marks=THINK, inside=inside)
    assert (heard.reasoning, heard.text) == (reasoning, prose)


def test_a_call_follows_reasoning() -> None:
    text = 'a <tool_call> b</think>\n<tool_call>\n{"name": "now"}\n</tool_call>'
    heard = read(BY_NAME["hermes"], text, marks=THINK, inside=True)
    assert heard == Heard("", "a <tool_call> b", [("now", "{}")], [None])


def test_harmonys_analysis_is_reasoning() -> None:
    text = "<|channel|>analysis<|message|>I think.<|end|><|channel|>final<|message|>Yes."
    heard = read(BY_NAME["harmony"], text)
    assert (heard.reasoning, heard.text) == ("I think.", "Yes.")


# which format


@pytest.mark.parametrize(("name", "text", "prose", "calls"), CALLS)
def test_a_template_shows_its_format(name: str, text: str, prose: str, calls: Any) -> None:
    assert shown_by(text) is BY_NAME[name]


def test_a_template_without_calls_shows_none() -> None:
    assert shown_by("{{ messages }}") is None
    assert marks_of("{{ messages }}") is None
    assert marks_of("<think>\n\n</think>") == THINK


# whatever comes

WORDS = sorted(
    {word for form in FORMATS for word in (*form.marks, *form.shown_by)}
    | {'{"name": "now"', ', "arguments": ', "{}", "{", "}", "[", "]", '"', "\\", "name", ">", " "}
    | {"<think>", "</think>", "<parameter=a>", "</parameter>", "now", "[ARGS]", "<|message|>"}
    | {"<invoke name=", "</tool_call>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "function", "\n"}
)


@given(
    words=st.lists(st.sampled_from(WORDS), max_size=14),
    form=st.sampled_from([*FORMATS, ARRAY, PROSE]),
    inside=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=4),
)
@example(words=["\n"], form=ARRAY, inside=False, cuts=[])
def test_no_text_is_too_odd_and_no_cut_changes_what_is_heard(
    words: list[str], form: Format, inside: bool, cuts: list[int]
) -> None:
    text = "".join(words)
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = hear(speech(form, TOOLS, THINK, inside=inside), [text])
    assert hear(speech(form, TOOLS, THINK, inside=inside), pieces) == whole
    if not whole.calls and not inside and "<think>" not in text and form.name != "harmony":
        assert whole.text == text


def test_reading_takes_time_by_the_length_of_a_text() -> None:
    """Counted in characters that are looked at: pieces of a long value are each read once."""
    reader = speech(BY_NAME["hermes"], TOOLS, None, inside=False)
    reader.push('<tool_call>{"name": "weather", "arguments": {"city": "')
    for _ in range(20_000):
        reader.push("abcde")
        assert not reader._rest
    assert formats.BY_NAME["hermes"].marks == ("<tool_call>",)

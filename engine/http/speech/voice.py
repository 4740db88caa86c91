"""How a served model speaks: its format of calls, the marks of its reasoning, which it shows.

Chosen by the chat template, unless a flag names the format. Not responsible for reading (reader).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from engine.http.speech.formats import ARRAY, BY_NAME, PROSE, Format, shown_by
from engine.http.speech.reader import Prose, Reader, Speech, Steps, Tools
from engine.http.speech.reasoning import Marks, marks_of, speech

AUTO, OWN = "auto", "template"  # values of --tool-format beside the formats' names
FALLBACK = BY_NAME["hermes"]  # what a model is told that has no format of its own
ParseResponse = Callable[[str], Mapping[str, Any]]  # a message, as transformers returns it


@dataclass(frozen=True)
class Voice:
    """Threads may share it."""

    form: Format
    marks: Marks | None

    @classmethod
    def of(cls, template: str, wanted: str, parse: ParseResponse | None) -> Voice:
        """By a chat template. `parse`: of a tokenizer that says itself how answers are read; it is
        taken where the template shows no format that we read as it comes, or `wanted` says so."""
        marks = marks_of(template)
        if wanted not in (AUTO, OWN):
            return cls(BY_NAME[wanted], marks)
        found = None if wanted == OWN else shown_by(template)
        if found is None and parse is not None:
            return cls(parsed_whole(parse), None)
        return cls(found or FALLBACK, marks)

    @property
    def always_read(self) -> bool:
        """Also of answers to bodies without tools."""
        return self.form.name in ("harmony", OWN)

    def shown(self, special: Mapping[int, str], *, tools: bool) -> frozenset[int]:
        """Of the special tokens those whose literals its text must hold to be read."""
        known: Collection[str] = ()
        if tools or self.always_read:
            known = self.form.tokens
        if self.marks is not None:
            known = (*known, self.marks.begin, self.marks.end)
        return frozenset(i for i, text in special.items() if text in known)

    def speech(self, tools: Tools | None, *, must_call: bool, inside: bool) -> Speech:
        """Of one answer; `tools`: None where nothing may be called. `inside`: the prompt ends in
        the middle of reasoning."""
        form = PROSE
        if must_call:
            form = ARRAY
        elif tools is not None or self.always_read:
            form = self.form
        if form is PROSE and self.marks is None:
            return Prose()
        return speech(form, tools or Tools(), self.marks, inside=inside)

    def make_call_id(self) -> str:
        """For a call that the model gives none."""
        letters = self.form.call_id_letters
        return f"call_{uuid.uuid4().hex[:24]}" if letters is None else uuid.uuid4().hex[:letters]

    def ends_inside(self, text: str) -> bool:
        """Whether a prompt that ends with this text leaves the model in its reasoning."""
        return self.marks is not None and text.rstrip().endswith(self.marks.begin)


def parsed_whole(parse: ParseResponse) -> Format:
    """A format that is read at the end, by the tokenizer's own words for it. What it can't read is
    text."""

    def read(reader: Reader, tools: Tools) -> Steps[None]:
        text, _ = yield from reader.find(())
        try:
            message = parse(text)
            said = message.get("reasoning_content") or message.get("thinking") or ""
            calls = [call["function"] for call in message.get("tool_calls") or ()]
            told = [(str(each["name"]), each.get("arguments", {})) for each in calls]
            content = str(message.get("content") or "")
        except Exception:  # whatever a schema of others raises
            reader.text(text)
            return
        reader.reasoning(str(said))
        reader.text(content)
        for name, arguments in told:
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False, default=str)
            reader.call(name)(arguments)

    return Format(OWN, read, ())

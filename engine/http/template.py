"""The model's chat template: text of messages, which roles and tools it has a place for.

Many templates leave out, without a word, a message of a role that they don't know. What a template
does with each role is found out once, by rendering a conversation in which a message of that role
stands out; so is what it does with tools, with calls of them and with their answers. What it has
no place for there is written as Hermes' models know it. Not responsible for tokens (tokenizer), nor
for reading calls (speech).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]

STANDS_OUT = "Zqxjkvb"
NOBODY = "nobody"  # no template knows this role
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL_ID = "call00001"  # 9 letters and digits: Mistral's templates take no other
# what stands before the message in question, and after it; "later": not the first of the messages
PLACES: Mapping[str, Mapping[str, tuple[list[Message], list[Message]]]] = {
    "system": {"first": ([], [USER]), "later": ([USER, ASSISTANT], [USER])},
    "developer": {"first": ([], [USER]), "later": ([USER, ASSISTANT], [USER])},
    "user": {"first": ([], []), "later": ([USER, ASSISTANT], [])},
    "assistant": {"later": ([USER], [USER])},
    "tool": {"later": ([USER, ASSISTANT], [])},
}
HERMES_TOOLS = """# Tools

You may call one or more functions. They are described by JSON within <tools></tools>:
<tools>
{tools}
</tools>

To call one, answer with a JSON object of its name and its arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <object>}}
</tool_call>"""


@dataclass(frozen=True)
class Conversation:
    """What a template is given. `variables`: further ones, as `enable_thinking`."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


Render = Callable[[Conversation], str]


class TemplateError(Exception):
    """The model's chat template refuses these messages, or there is none. `param`: the field."""

    def __init__(self, text: str, param: str = "messages") -> None:
        super().__init__(f"{param}: {text}")
        self.param = param


class ChatTemplate:
    """A template that loses no message. `render` raises TemplateError for what it refuses."""

    def __init__(self, render: Render) -> None:
        self._render = render
        told_apart = self._place("user", "first") != self._place("user", "first", role=NOBODY)
        # a tool's answer in the words of another role would be taken for what that one said
        self._nobody = [
            role for role in ("developer", "tool") if told_apart and self._is_nobody(role)
        ]
        self._left_out = {
            (role, place)
            for role, places in PLACES.items()
            for place in places
            if role in self._nobody or self._leaves_out(role, place)
        }
        takes_system = self._place("system", "first") is not None and not self._is_out("system")
        own_developer = self._place("developer", "first") is not None
        self._alias = {}
        if takes_system and (not own_developer or self._is_out("developer")):
            self._alias = {"developer": "system"}
        self._takes_system = takes_system
        self.takes_tools = self._shows(Conversation([USER], [_tool(STANDS_OUT)]))
        called = [USER, _calling(STANDS_OUT), _answer("c"), ASSISTANT, USER]
        answered = [USER, _calling("f"), _answer(STANDS_OUT)]
        self._takes_calls = self._shows(Conversation(called, [_tool(STANDS_OUT + "x")])) and (
            self._shows(Conversation(answered, [_tool("f")]))
        )

    def text(self, conversation: Conversation) -> str:
        """The conversation up to where the assistant speaks. Raises TemplateError, also for a
        message that would not be in it."""
        messages = list(conversation.messages)
        tools = conversation.tools
        if _has_calls(messages) and not self._takes_calls:
            messages = [_plainly(each) for each in messages]
        if tools and not self.takes_tools:
            messages, tools = self._with_tools(messages, tools), ()
        fitted = [self._fitted(index, each) for index, each in enumerate(messages)]
        return self._render(Conversation(fitted, tools, conversation.variables))

    def _with_tools(
        self, messages: list[Message], tools: Sequence[Mapping[str, Any]]
    ) -> list[Message]:
        """The tools told in the system's message, or in the first one where there is no such."""
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        told = HERMES_TOOLS.format(tools=lines)
        first = messages[0]
        if first["role"] in ("system", "developer") or not self._takes_system:
            content = f"{first['content']}\n\n{told}" if first["content"] else told
            return [{**first, "content": content}, *messages[1:]]
        return [{"role": "system", "content": told}, *messages]

    def _fitted(self, index: int, message: Message) -> Message:
        asked = message["role"]
        role = self._alias.get(asked, asked)
        if role == "tool" and self._takes_calls:
            return message
        if (role, "later" if index else "first") in self._left_out:
            known = [each for each in PLACES if not self._is_out(self._alias.get(each, each))]
            place = "first place only" if asked in known else "no place"
            raise TemplateError(
                f"the model's chat template has {place} for {asked!r}; it knows {', '.join(known)}",
                f"messages.{index}.role",
            )
        return {**message, "role": role}

    def _is_out(self, role: str) -> bool:
        """Of every place."""
        return all((role, place) in self._left_out for place in PLACES[role])

    def _shows(self, conversation: Conversation) -> bool:
        """Whether what stands out is in its text."""
        try:
            return STANDS_OUT in self._render(conversation)
        except TemplateError:
            return False

    def _place(self, known: str, place: str, *, role: str | None = None) -> str | None:
        """A conversation in which `role` says what stands out, where `known` has its place; None:
        the template refuses it."""
        before, after = PLACES[known][place]
        message = {"role": role or known, "content": STANDS_OUT}
        try:
            return self._render(Conversation([*before, message, *after]))
        except TemplateError:
            return None

    def _leaves_out(self, role: str, place: str) -> bool:
        text = self._place(role, place)
        return text is not None and STANDS_OUT not in text

    def _is_nobody(self, role: str) -> bool:
        """Whether the template shows it as it shows a role that doesn't exist."""
        texts = [(self._place(role, p), self._place(role, p, role=NOBODY)) for p in PLACES[role]]
        return all(text is not None and text == nobodys for text, nobodys in texts)


def _tool(name: str) -> Mapping[str, Any]:
    parameters = {"type": "object", "properties": {}}
    function = {"name": name, "description": "d", "parameters": parameters}
    return {"type": "function", "function": function}


def _calling(name: str) -> Message:
    call = {
        "id": CALL_ID,
        "type": "function",
        "function": {"name": name, "arguments": {"k": "v"}},
    }
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _answer(content: str) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": CALL_ID, "name": "f"}


def _has_calls(messages: Sequence[Message]) -> bool:
    return any(message.get("tool_calls") for message in messages)


def _plainly(message: Message) -> Message:
    """Calls and answers as text, for a template that has no place for them."""
    if message["role"] == "tool":
        told = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": told}
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    told = "\n".join(f"<tool_call>\n{function}\n</tool_call>" for function in functions)
    content = f"{message['content']}\n{told}" if message["content"] else told
    return {"role": message["role"], "content": content}

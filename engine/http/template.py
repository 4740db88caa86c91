"""The model's chat template: text of messages, and which roles it has a place for.

Many templates leave out, without a word, a message of a role that they don't know. What a template
does with each role is found out once, by rendering a conversation in which a message of that role
stands out. Not responsible for tokens (tokenizer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]

STANDS_OUT = "Zqxjkvb"
NOBODY = "nobody"  # no template knows this role
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
# what stands before the message in question, and after it; "later": not the first of the messages
PLACES: Mapping[str, Mapping[str, tuple[list[Message], list[Message]]]] = {
    "system": {"first": ([], [USER]), "later": ([USER, ASSISTANT], [USER])},
    "developer": {"first": ([], [USER]), "later": ([USER, ASSISTANT], [USER])},
    "user": {"first": ([], []), "later": ([USER, ASSISTANT], [])},
    "assistant": {"later": ([USER], [USER])},
    "tool": {"later": ([USER, ASSISTANT], [])},
}


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

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant speaks. Raises TemplateError, also for a
        message that would not be in it."""
        return self._render([self._fitted(index, each) for index, each in enumerate(messages)])

    def _fitted(self, index: int, message: Message) -> Message:
        asked = message["role"]
        role = self._alias.get(asked, asked)
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

    def _place(self, known: str, place: str, *, role: str | None = None) -> str | None:
        """A conversation in which `role` says what stands out, where `known` has its place; None:
        the template refuses it."""
        before, after = PLACES[known][place]
        message = {"role": role or known, "content": STANDS_OUT}
        try:
            return self._render([*before, message, *after])
        except TemplateError:
            return None

    def _leaves_out(self, role: str, place: str) -> bool:
        text = self._place(role, place)
        return text is not None and STANDS_OUT not in text

    def _is_nobody(self, role: str) -> bool:
        """Whether the template shows it as it shows a role that doesn't exist."""
        texts = [(self._place(role, p), self._place(role, p, role=NOBODY)) for p in PLACES[role]]
        return all(text is not None and text == nobodys for text, nobodys in texts)

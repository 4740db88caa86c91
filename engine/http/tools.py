"""Tools in bodies: what may be called, what must be, what was called.

Not responsible for how a model writes calls (speech), nor for grammars (grammars).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.http.fields import Ignored, Strict

TOOLS_MAX = 1024
CALLS_MAX = 1024  # of one message
NAME_CHARACTERS_MAX = 256

ToolName = Annotated[
    str, Field(min_length=1, max_length=NAME_CHARACTERS_MAX, pattern=r"^[^\s<>{}\"']+$")
]


class Function(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema; none: no arguments
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.parameters or {"type": "object", "properties": {}}


class Tool(Strict):
    type: Literal["function"]
    function: Function

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.schema_of_arguments
        return {"type": "function", "function": function}


class Named(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: Named


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=TOOLS_MAX, fail_fast=True)]


class ChosenAllowed(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ChosenTool = Annotated[NamedTool | ChosenAllowed, Field(discriminator="type")]
ToolChoice = Literal["none", "auto", "required"] | ChosenTool


class CalledFunction(Strict):
    name: ToolName
    arguments: str = ""


class ToolCall(Strict):
    """A call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None  # as streams number them

    @property
    def for_template(self) -> dict[str, Any]:
        """Arguments as an object where they are one: templates write it as their models know it."""
        arguments: Any = self.function.arguments
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            arguments = parsed
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id or "", "type": "function", "function": function}


class Tooled(Strict):
    """The fields of a chat's body that are about tools."""

    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tools")
    @classmethod
    def _each_once(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice[:80]!r} is there twice")
        return tools

    @model_validator(mode="after")
    def _chosen_are_there(self) -> Tooled:
        known = {tool.function.name for tool in self.tools or ()}
        asks = self.tool_choice not in (None, "none", "auto")
        if asks and not known:
            raise ValueError("tool_choice needs tools")
        missing = sorted(self._named() - known)
        if missing:
            raise ValueError(f"tool_choice: {missing[0][:80]!r} is none of the tools")
        return self

    def _named(self) -> set[str]:
        if isinstance(self.tool_choice, NamedTool):
            return {self.tool_choice.function.name}
        if isinstance(self.tool_choice, ChosenAllowed):
            return {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
        return set()

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def callable_tools(self) -> list[Tool]:
        """Of those the ones that it may call."""
        named = self._named()
        return [t for t in self.offered if not named or t.function.name in named]

    @property
    def must_call(self) -> bool:
        choice = self.tool_choice
        if isinstance(choice, ChosenAllowed):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, NamedTool)

    @property
    def calls_max(self) -> int | None:
        """None: as many as it likes."""
        one = self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)
        return 1 if one else None

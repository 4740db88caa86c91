"""What real clients do with a served script, run in an environment that has them:
`python client_calls.py URL MODEL` prints a line of JSON for each. Not a test itself: test_clients.

The script calls `weather` when it is asked for the weather, and says "It rains." to "rain".
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

QUESTION = "How is the weather?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}


def by_openai(url: str, model: str) -> Any:
    """An agent's loop by hand, streamed."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    messages: Any = [{"role": "user", "content": QUESTION}]
    asked: Any = {"model": model, "tools": tools, "temperature": 0, "max_tokens": 50}
    with client.chat.completions.stream(messages=messages, **asked) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or ()
    messages.append(message.to_dict())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    last = client.chat.completions.create(messages=messages, **asked)
    return [
        call.function.name,
        json.loads(call.function.arguments),
        last.choices[0].message.content,
    ]


def by_langchain(url: str, model: str) -> Any:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", temperature=0)
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    bound = chat.bind_tools([tool])
    asked = HumanMessage(QUESTION)
    message = bound.invoke([asked])
    (call,) = message.tool_calls
    last = bound.invoke([asked, message, ToolMessage("rain", tool_call_id=call["id"])])
    streamed = "".join(str(piece.content) for piece in chat.stream("rain"))
    return [call["name"], call["args"], last.content, streamed]


def by_llamaindex(url: str, model: str) -> Any:
    """Its OpenAI-like model runs the tool itself."""
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    seen: list[str] = []

    def weather(city: str) -> str:
        """The weather in a city."""
        seen.append(city)
        return "rain"

    llm = OpenAILike(
        model=model,
        api_base=f"{url}/v1",
        api_key="none",
        temperature=0,
        context_window=2000,
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
    )
    told = llm.predict_and_call([FunctionTool.from_defaults(weather)], user_msg=QUESTION)
    asked = [ChatMessage(role="user", content="rain")]
    streamed = "".join(piece.delta or "" for piece in llm.stream_chat(asked))
    return [seen, str(told), llm.complete("rain").text, streamed]


def by_litellm(url: str, model: str) -> Any:
    """What aider and others call models by."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it asks the internet for prices else
    import litellm

    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    asked: Any = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none"}
    asked |= {"temperature": 0, "num_retries": 0}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    message = litellm.completion(messages=messages, tools=tools, **asked).choices[0].message
    (call,) = message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    last = litellm.completion(messages=messages, tools=tools, **asked).choices[0].message
    pieces = litellm.completion(messages=messages, stream=True, **asked)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    return [call.function.name, json.loads(call.function.arguments), last.content, streamed]


def by_agents(url: str, model: str, *, responses: bool) -> Any:
    """The Agents SDK runs the tool itself."""
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    seen: list[str] = []

    @function_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        seen.append(city)
        return "rain"

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    kind = OpenAIResponsesModel if responses else OpenAIChatCompletionsModel
    agent = Agent(
        name="a",
        instructions="Be brief.",
        model=kind(model=model, openai_client=client),
        tools=[weather],
        model_settings=ModelSettings(temperature=0),
    )
    return [seen, asyncio.run(Runner.run(agent, QUESTION)).final_output]


def by_ollama(url: str, model: str) -> Any:
    from ollama import Client

    client = Client(host=url)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    options = {"temperature": 0}
    message = client.chat(model, messages=messages, tools=tools, options=options).message
    (call,) = message.tool_calls or ()
    messages += [message, {"role": "tool", "content": "rain", "tool_name": "weather"}]
    pieces = client.chat(model, messages=messages, tools=tools, options=options, stream=True)
    text = "".join(piece.message.content or "" for piece in pieces)
    generated = client.generate(model, prompt="rain", options=options).response
    names = [each.model for each in client.list().models]
    shown = client.show(model).capabilities
    arguments = dict(call.function.arguments)
    return [call.function.name, arguments, text, generated, names, "tools" in (shown or [])]


def by_anthropic(url: str, model: str) -> Any:
    from anthropic import Anthropic

    client = Anthropic(base_url=url, api_key="none", max_retries=0)
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    mark = {"type": "ephemeral", "ttl": "1h"}
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": mark}]
    asked: Any = {"model": model, "max_tokens": 50, "system": system, "tools": tools}
    messages: Any = [{"role": "user", "content": QUESTION}]
    with client.messages.stream(messages=messages, **asked) as stream:
        message = stream.get_final_message()
    (call,) = [block for block in message.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    messages += [
        {"role": "assistant", "content": [block.to_dict() for block in message.content]},
        {"role": "user", "content": [result]},
    ]
    last = client.messages.create(messages=messages, **asked)
    usage = last.usage.cache_read_input_tokens is not None
    return [call.name, call.input, last.content[0].text, message.stop_reason, usage]


CLIENTS: dict[str, Callable[[str, str], Any]] = {
    "openai": by_openai,
    "langchain": by_langchain,
    "llamaindex": by_llamaindex,
    "litellm": by_litellm,
    "agents, chat": lambda url, model: by_agents(url, model, responses=False),
    "agents, responses": lambda url, model: by_agents(url, model, responses=True),
    "ollama": by_ollama,
    "anthropic": by_anthropic,
}


if __name__ == "__main__":
    for name, call in CLIENTS.items():
        try:
            told = call(sys.argv[1], sys.argv[2])
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        print(json.dumps([name, told]), flush=True)

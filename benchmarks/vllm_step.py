"""Drives vLLM's engine, step by step; run by step.py with the python of vLLM's environment.

    python vllm_step.py MODEL MAX_TOKENS

A command a line on stdin, an answer a line on stdout, both JSON: {"start": [prompt, ...]} (token
ids; prefills them all), {"steps": n} -> seconds of each of n decode steps, {"prefill": prompt} ->
seconds to its first token, {"end": true}. The first line of output is {"ready": true}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a step is then one call
from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt

LONG = 4096  # tokens that nobody waits for


class Driver:
    """One engine and the requests that run in it."""

    def __init__(self, model: str, max_tokens: int) -> None:
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                dtype="bfloat16",
                max_model_len=max_tokens,
                max_num_seqs=16,
                enable_prefix_caching=False,
                enforce_eager=bool(os.environ.get("STEP_EAGER")),
            )
        )
        self.running: list[str] = []
        self._added = 0

    def add(self, prompt: list[int], tokens: int) -> str:
        self._added += 1
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        name = str(self._added)
        self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        return name

    def start(self, prompts: list[list[int]]) -> None:
        self.running = [self.add(prompt, LONG) for prompt in prompts]
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun |= {each.request_id for each in self.engine.step() if each.outputs[0].token_ids}
        self.steps(2)

    def steps(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            self.engine.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def prefill(self, prompt: list[int]) -> float:
        begin = time.perf_counter()
        self.add(prompt, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - begin

    def end(self) -> None:
        self.engine.abort_request(self.running)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def answer(driver: Driver, command: dict[str, Any]) -> Any:
    ((name, argument),) = command.items()
    return driver.end() if name == "end" else getattr(driver, name)(argument)


def main(model: str, max_tokens: str) -> None:
    out = os.fdopen(os.dup(1), "w")  # what vLLM prints itself goes to stderr
    os.dup2(2, 1)
    driver = Driver(model, int(max_tokens))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(driver, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

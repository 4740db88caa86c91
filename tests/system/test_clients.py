"""Real clients, unchanged, against a served engine: each calls a tool and takes its answer; aider
edits a file.

They are installed into environments of the tests' own, since agents' packages bring many others.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.doubles.scripted import Script
from tests.system.engine import EngineProcess

PACKAGES = (
    *("openai", "langchain-openai", "llama-index-llms-openai-like", "litellm", "openai-agents"),
    *("ollama", "anthropic"),
)
INSTALL_S = 600
CALL = (
    "<tool_call>\n",
    '{"name": "weather", ',
    '"arguments": {"city": ',
    '"Paris"}}',
    "\n</tool_call>",
)
SCRIPTS = {"weather": CALL, "rain": ("It ", "rains.")}
POEM = {"poem": ("poem.txt\n", "```\n", "It pours.", "\n", "```")}
PARIS = {"city": "Paris"}
WANTED: dict[str, Any] = {
    "openai": ["weather", PARIS, "It rains."],
    "langchain": ["weather", PARIS, "It rains.", "It rains."],
    "llamaindex": [["Paris"], "rain", "It rains.", "It rains."],
    "litellm": ["weather", PARIS, "It rains.", "It rains."],
    "agents, chat": [["Paris"], "It rains."],
    "agents, responses": [["Paris"], "It rains."],
    "ollama": ["weather", PARIS, "It rains.", "It rains.", ["scripted"], True],
    "anthropic": ["weather", PARIS, "It rains.", "tool_use", True],
}


def python_with(packages: Sequence[str], folder: Path) -> Path:
    """Skips the test where no package index answers."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "-q", *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode:
        pytest.skip(f"the clients can't be installed here: {done.stderr[-300:]}")
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_clients_call_tools_and_take_their_answers(tmp_path: Path) -> None:
    python = python_with(PACKAGES, tmp_path / "venv")
    (tmp_path / "model").mkdir()
    model = Script(SCRIPTS).checkpoint(tmp_path / "model")
    flags = ("--served-model-name", "scripted", "--dtype", "float32")
    with EngineProcess(model, tmp_path / "log", *flags) as engine:
        script = ROOT / "tests" / "system" / "client_calls.py"
        done = subprocess.run(
            [str(python), str(script), engine.url, "scripted"],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    told = dict(json.loads(line) for line in done.stdout.splitlines())
    assert told == WANTED, done.stderr[-2000:] + (tmp_path / "log").read_text()[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_aider_edits_a_file(tmp_path: Path) -> None:
    python = python_with(["aider-chat==0.86.2"], tmp_path / "venv")
    (tmp_path / "model").mkdir()
    (tmp_path / "work").mkdir()
    model = Script(POEM).checkpoint(tmp_path / "model", max_position_embeddings=32_768)
    flags = ("--served-model-name", "scripted", "--dtype", "float32", "--num-pages", "2048")
    alone = "--yes-always --no-git --no-check-update --no-show-model-warnings --no-analytics"
    command = [python.with_name("aider"), "--model", "openai/scripted", "--edit-format", "whole"]
    command += [*alone.split(), "--message", "Write the poem", "poem.txt"]
    with EngineProcess(model, tmp_path / "log", *flags) as engine:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path / "work",
            env={
                **os.environ,
                "HOME": str(tmp_path),
                "OPENAI_API_BASE": f"{engine.url}/v1",
                "OPENAI_API_KEY": "none",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    told = done.stdout[-2000:] + done.stderr[-2000:] + (tmp_path / "log").read_text()[-2000:]
    assert (tmp_path / "work" / "poem.txt").read_text() == "It pours.\n", told


@pytest.mark.parametrize("stream", [False, True])
def test_the_served_script_is_what_the_double_says(tmp_path: Path, stream: bool) -> None:
    """Through weights, kernels and HTTP of a real process."""
    (tmp_path / "model").mkdir()
    model = Script(SCRIPTS).checkpoint(tmp_path / "model")
    with EngineProcess(model, tmp_path / "log", "--served-model-name", "scripted") as engine:
        answer = engine.openai.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": "rain?"}],
            temperature=0,
            stream=stream,
        )
        if stream:
            pieces: Any = answer
            text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        else:
            whole: Any = answer
            text = whole.choices[0].message.content
        assert text == "It rains."

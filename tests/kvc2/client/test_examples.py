"""The examples of kvc2/client do what they say, as whoever reads them runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.doubles.daemons import ServedDaemon, serve_config

FOLDER = ROOT / "kvc2" / "client" / "examples"
LINES_MAX = 30  # of code: a longer one is not read
PRINTED = {  # by a first run, and by one after it
    "engine": (
        ["first: 0 tokens cached, KV equal", "again: 96 tokens cached, KV equal"],
        ["first: 96 tokens cached, KV equal", "again: 96 tokens cached, KV equal"],
    ),
    "flat_keys": (
        ["0 of 8 were there", "8 stored", "8 loaded, equal"],
        ["8 of 8 were there", "8 stored", "8 loaded, equal"],
    ),
    "images": (
        ["cat: 0 tokens cached", "cat: 96 tokens cached", "dog: 32 tokens cached"],
        ["cat: 96 tokens cached", "cat: 96 tokens cached", "dog: 96 tokens cached"],
    ),
    "private_memory": (
        ["0 of 8 blocks cached, 8 stored, KV equal"],
        ["8 of 8 blocks cached, 0 stored, KV equal"],
    ),
    "workers": (["0 tokens cached, KV equal"], ["96 tokens cached, KV equal"]),
}


def lines_of_code(path: Path) -> list[str]:
    text = path.read_text().split('"""', 2)[2]  # after the docstring
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "import ", "from "))]


def run(name: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", f"kvc2.client.examples.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_does_what_it_says(name: str, tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path), cache=None) as served:
        for printed in PRINTED[name]:
            assert run(name, served.address) == printed


def test_each_example_is_short_and_runs() -> None:
    found = [path for path in FOLDER.glob("*.py") if path.stem != "__init__"]
    assert {path.stem for path in found} == set(PRINTED)
    long = {path.stem: count for path in found if (count := len(lines_of_code(path))) > LINES_MAX}
    assert not long

"""Another engine's classes in a process of an environment that has them: a driver of this folder
reads a word a line, and answers it with a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.doubles.waiting import wait_until

FOLDER = Path(__file__).parent


class Driven:
    """A driver that runs. Its stderr goes to folder/DRIVER.log."""

    def __init__(self, python: Path, driver: str, folder: Path, *words: str) -> None:
        self._log = folder / f"{driver}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(python), str(FOLDER / driver), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                text=True,
            )

    def ask(self, word: str) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._log.read_text()[-2000:]
        answer: dict[str, int] = json.loads(line)
        return answer

    def wait_attached(self, nothing: dict[str, int]) -> None:
        """Until then it loads nothing."""
        wait_until(lambda: self.ask("load") != nothing)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

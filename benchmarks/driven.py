"""Another engine's classes in a process of an environment that has them: a driver, which is a file
of Python, reads a word a line and answers it with a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from benchmarks.processes import ProcessError


class Driven:
    """A driver that runs. Its stderr goes to folder/DRIVER.log."""

    def __init__(self, python: Path, driver: Path, folder: Path, *words: str) -> None:
        self._log = folder / f"{driver.stem}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(python), str(driver), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                text=True,
            )

    def ask(self, word: str) -> dict[str, int]:
        """Raises ProcessError when it has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ProcessError("it has no pipes")
        stdin.write(f"{word}\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise ProcessError(self._log.read_text()[-2000:])
        answer: dict[str, int] = json.loads(line)
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

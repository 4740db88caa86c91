"""Do the index's tests catch bugs? Plants each bug of mutant_patches.py in a copy of csrc/, builds
it, runs the index tests over it, and demands that something fails. Slow: half a minute a bug.

    python -m tests.csrc.mutants [--only WORD ...] [--folder FOLDER]

Exits with 1 when a bug survives. The copy lies in a temporary folder, or in one that is kept, so
that the next run builds less; the installed extension is left alone.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import ROOT
from tests.csrc.mutant_patches import MUTANTS, Mutant

HOUSE = ROOT
CPP_TESTS = ["test_index", "test_index_collision", "test_key_table"]
PYTHON_TESTS = [
    "tests/csrc/test_index.py",
    "tests/csrc/test_index_admission.py",
    "tests/csrc/test_index_restore.py",
    "tests/csrc/test_index_returns.py",
    "tests/csrc/test_index_prefetch.py",
    "tests/csrc/test_index_demotion.py",
    "tests/csrc/test_index_events.py",
    "tests/csrc/test_index_tenants.py",
    "tests/csrc/test_index_explain.py",
    "tests/csrc/test_index_cold.py",
    "tests/csrc/test_index_keys.py",
    "tests/csrc/test_index_machine.py",
    "tests/kvc2/cache/test_lives.py",
]
LIMIT_S = 300  # a bug that makes a test hang is caught too
BUILD_LIMIT_S = 1800


class Bench:
    """A copy of csrc/ with its build, where one bug at a time is planted."""

    def __init__(self, folder: Path) -> None:
        self.source, self.build = folder / "csrc", folder / "build"
        for file in (HOUSE / "csrc").rglob("*.*"):
            copy = self.source / file.relative_to(HOUSE / "csrc")
            if not copy.exists() or copy.read_bytes() != file.read_bytes():  # else built already
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
        pybind = [sys.executable, "-m", "pybind11", "--cmakedir"]
        found = subprocess.run(pybind, check=True, capture_output=True, text=True).stdout.strip()
        self.command(
            "cmake", "-S", self.source, "-B", self.build, "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -w",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={found}",
        )  # fmt: skip
        self.make()
        self.compile_tests("index.h")

    def command(self, *words: str | Path, limit_s: float = LIMIT_S, **environment: str) -> None:
        """Raises CalledProcessError, with what was printed, or TimeoutExpired."""
        subprocess.run(
            [str(word) for word in words], cwd=HOUSE, env={**os.environ, **environment},
            check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=limit_s,
        )  # fmt: skip

    def make(self) -> None:
        build = ["cmake", "--build", self.build, "--target", "_core", "-j", "2"]
        self.command(*build, limit_s=BUILD_LIMIT_S)

    def compile_tests(self, changed: str) -> None:
        """Again where a header has changed."""
        for name in CPP_TESTS if changed.endswith(".h") else []:
            source = HOUSE / f"tests/cpp/{name}.cpp"
            flags = ["-std=c++20", "-O1", "-I", self.source]
            self.command("g++", *flags, "-c", source, "-o", self.object(name))

    def object(self, name: str) -> Path:
        return self.build / f"{name}.o"

    def cpp_test(self, name: str) -> None:
        """Linked by hand: the build would make every library of the house for it."""
        libraries = [self.build / f"libkvc2_{floor}.a" for floor in ("index", "eviction", "base")]
        program = self.build / name
        self.command("g++", "-pthread", self.object(name), *libraries, "-o", program)
        self.command(program)

    def tests(self) -> str | None:
        """What failed first; None when all held."""
        try:
            for name in CPP_TESTS:
                self.cpp_test(name)
            self.command(
                sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "tests.csrc.sanitized",
                "-p", "no:faulthandler", "-m", "not slow", *PYTHON_TESTS,
                KVC2_EXTENSIONS=str(self.build), KVC2_WALK="hunt",
            )  # fmt: skip
        except subprocess.CalledProcessError as failed:
            return reason(failed)
        except subprocess.TimeoutExpired:
            return f"more than {LIMIT_S} s"
        return None

    def plant(self, mutant: Mutant) -> str | None:
        """What caught the bug; None when nothing did."""
        file = self.source / "index" / mutant.file
        sound = file.read_text()
        if sound.count(mutant.before) != 1:
            raise ValueError(f"{mutant.name}: its text is {sound.count(mutant.before)} times there")
        file.write_text(sound.replace(mutant.before, mutant.after))
        try:
            try:
                self.make()
            except subprocess.CalledProcessError as failed:
                raise ValueError(f"{mutant.name} does not build:\n{failed.output}") from failed
            self.compile_tests(mutant.file)
            return self.tests()
        finally:
            file.write_text(sound)
            self.compile_tests(mutant.file)


def reason(failed: subprocess.CalledProcessError) -> str:
    lines = [line.strip() for line in failed.output.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("FAILED", "ERROR", "check failed"))]
    return (named or lines or [f"exit {failed.returncode}"])[-1][:110]


def chosen(words: list[str]) -> list[Mutant]:
    return [m for m in MUTANTS if any(word in f"{m.file}: {m.name}" for word in words)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="bugs whose file or name holds one of these",
    )
    parser.add_argument("--folder", help="where the copy and its build are kept")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = asked.folder or stack.enter_context(tempfile.TemporaryDirectory())
        bench = Bench(Path(folder))
        if sound := bench.tests():
            print(f"without any bug: {sound}")
            return 1
        survivors = 0
        for mutant in chosen(asked.only):
            start = time.monotonic()
            caught = bench.plant(mutant)
            survivors += caught is None
            took_s = time.monotonic() - start
            print(f"{mutant.name:44} {took_s:4.0f} s  {caught or 'SURVIVES'}", flush=True)
    print(f"{survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

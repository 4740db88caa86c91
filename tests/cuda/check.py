"""What this house promises of a CUDA device, checked on one: `make cuda-check`.

    python -m tests.cuda.check [--driver hostile] [--arena-gb N] [--only STEP ...] [--json FILE]

Each step is a process of its own with a limit, since a poisoned context is for life. It prints what
it measured; a table of all steps and a JSON file follow. Exit code 1 when a law broke; what can't
be checked here is told as skipped, with the reason. `--driver hostile` runs what can run without a
GPU, on the hostile driver: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests import ROOT
from tests.cuda import hostile

PYTEST = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist")
LAWS, ENGINE = "tests/cuda/laws/", "tests/engine/test_cuda.py"
SKIPPED = 77  # exit code of a step that can't be taken here; its last line says why


@dataclass(frozen=True)
class Step:
    """`words`: what a Python process is told to run; `limit_s`: how long it may take."""

    name: str
    limit_s: int
    words: tuple[str, ...]
    about: str


def measured(name: str, limit_s: int, about: str) -> Step:
    return Step(name, limit_s, ("-m", "tests.cuda.measure", name), about)


STEPS = (
    measured("facts", 30, "device, driver, attributes that the code relies on"),
    measured("registration", 60, "seconds a GB; a sealed memfd; a map that can only be read"),
    measured("sharing", 60, "a descriptor opened elsewhere; the same bytes after kill -9"),
    measured("bandwidth", 90, "2-D rows by size and group, beside one plain copy"),
    measured("overlap", 90, "copies of one process beside another's products"),
    Step("copies", 90, (*PYTEST, LAWS + "mover_laws.py"), "the laws of the mover"),
    Step("calls", 60, (*PYTEST, LAWS + "host_call_laws.py"), "streams that call the host"),
    Step("workers", 240, (*PYTEST, LAWS + "executor_laws.py"), "the contract, and every death"),
    Step("attention", 90, (*PYTEST, ENGINE, "-k", "attend"), "flashinfer"),
    Step("models", 120, (*PYTEST, ENGINE, "-k", "model or on_the_device_are"), "models"),
    Step("graphs", 60, (*PYTEST, "-s", ENGINE, "-k", "graphs"), "decode steps, replayed"),
    Step("hybrid", 60, (*PYTEST, "-s", ENGINE, "-k", "cold"), "cold experts beside the device"),
    Step("end", 240, (*PYTEST, "tests/cuda/test_end_to_end.py"), "daemon and engine, all tiers"),
)


@dataclass(frozen=True)
class Result:
    """`outcome`: ok, failed or skipped; `said`: what the step printed."""

    name: str
    outcome: str
    seconds: float
    why: str
    said: str


def take(step: Step, environment: dict[str, str]) -> Result:
    """The step, in a process of its own."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *step.words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=step.limit_s,
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        partial = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
        code, said = -1, f"{partial}\nmore than {step.limit_s} s"
    outcome, why = judged(code, said)
    return Result(step.name, outcome, round(time.monotonic() - began, 1), why, said)


def judged(code: int, said: str) -> tuple[str, str]:
    """Of a step's exit code and words: what became of it, and why."""
    lines = [line for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if code == SKIPPED:
        return "skipped", last
    if code:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        return "failed", (failed or [last])[0][:200]
    counted = re.search(r"(\d+) passed", last), re.search(r"(\d+) skipped", last)
    if counted[1] and not counted[0]:
        reasons = [line for line in lines if line.startswith("SKIPPED")]
        return "skipped", (reasons or [last])[0][:200]
    return "ok", last if counted[0] else ""


def table(results: list[Result]) -> str:
    rows = [f"{each.name:14}{each.outcome:9}{each.seconds:7.1f} s  {each.why}" for each in results]
    count: Callable[[str], int] = [each.outcome for each in results].count
    told = f"{count('ok')} ok, {count('failed')} failed, {count('skipped')} skipped"
    return "\n".join([*rows, told])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--driver", choices=["real", "hostile"], default="real")
    parser.add_argument("--arena-gb", type=float, default=4.0, help="of host memory, 10^9 bytes")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps by name")
    parser.add_argument("--json", type=Path, default=ROOT / "build/cuda-check.json")
    asked = parser.parse_args()
    environment = {**os.environ, "KVC2_DRIVER": asked.driver, "KVC2_ARENA_GB": str(asked.arena_gb)}
    if asked.driver == "hostile":
        environment |= hostile.environment("seed=1,late_us=100")
        environment["KVC2_ARENA_GB"] = str(min(asked.arena_gb, 0.016))
    results = []
    for step in STEPS:
        if asked.only is None or step.name in asked.only:
            print(f"-- {step.name}: {step.about}", flush=True)
            results.append(take(step, environment))
            print(results[-1].said, flush=True)
    print(table(results))
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    told = {"driver": asked.driver, "steps": [asdict(each) for each in results]}
    asked.json.write_text(json.dumps(told, indent=1))
    return 1 if any(each.outcome == "failed" for each in results) else 0


if __name__ == "__main__":
    sys.exit(main())

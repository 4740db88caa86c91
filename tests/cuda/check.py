"""What this house promises of a CUDA device, checked on one: `make cuda-check`.

    python -m tests.cuda.check [--driver hostile] [--arena-gb N] [--only STEP ...] [--json FILE]

Each step is a process of its own with a limit, since a poisoned context is for life. It prints what
it measured; a table of all steps and a JSON file follow, and a table of when first tokens came and
layers were told (moments). Exit code 1 when a law broke, or no time was left of 8 minutes; what
can't be checked here is told as not run, with the reason. `--driver hostile` runs what can run
without a GPU, on the hostile driver: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests import ROOT
from tests.cuda import hostile, moments

PYTEST = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist")
LAWS, ENGINE = "tests/cuda/laws/", "tests/engine/test_cuda.py"
NOT_RUN = 77  # exit code of a step that can't be taken here; its last line says why
LIMIT_S = 8 * 60  # of all steps
SKIPPED = r"SKIPPED \[\d+\] \S+ "  # what pytest says before a reason


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
    # what no CPU can run, first
    Step("calls", 60, (*PYTEST, LAWS + "host_call_laws.py"), "streams that call the host"),
    Step("attention", 90, (*PYTEST, ENGINE, "-k", "attend"), "flashinfer and plain torch"),
    Step("graphs", 60, (*PYTEST, "-s", ENGINE, "-k", "graphs"), "decode steps, replayed"),
    Step("hybrid", 60, (*PYTEST, "-s", ENGINE, "-k", "cold"), "cold experts beside the device"),
    measured("overlap", 90, "copies of one process beside another's products"),
    measured("registration", 60, "seconds a GB; a sealed memfd; a map that can only be read"),
    measured("sharing", 60, "a descriptor opened elsewhere; the same bytes after kill -9"),
    measured("bandwidth", 90, "2-D rows by size and group, beside one plain copy"),
    Step("copies", 90, (*PYTEST, LAWS + "mover_laws.py"), "the laws of the mover"),
    Step("models", 120, (*PYTEST, ENGINE, "-k", "model or on_the_device_are"), "models"),
    Step("end", 240, (*PYTEST, "tests/cuda/test_end_to_end.py"), "daemon and engine, all tiers"),
    Step("workers", 240, (*PYTEST, LAWS + "executor_laws.py"), "the contract, and every death"),
)


@dataclass(frozen=True)
class Result:
    """`outcome`: ok, failed or not run; `said`: what the step printed."""

    name: str
    outcome: str
    seconds: float
    why: str
    said: str


def take(step: Step, environment: dict[str, str], left_s: float) -> Result:
    """The step, in a process of its own."""
    limit_s = min(step.limit_s, left_s)
    if limit_s <= 0:
        return Result(step.name, "failed", 0.0, f"no time was left of {LIMIT_S} s", "")
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *step.words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        partial = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
        code, said = -1, f"{partial}\nmore than {limit_s:.0f} s"
    outcome, why = judged(code, said)
    return Result(step.name, outcome, round(time.monotonic() - began, 1), why, said)


def judged(code: int, said: str) -> tuple[str, str]:
    """Of a step's exit code and words: what became of it, and why."""
    lines = [line for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if code == NOT_RUN:
        return "not run", last
    if code:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        return "failed", (failed or [last])[0][:200]
    counted = re.search(r"(\d+) passed", last), re.search(r"(\d+) skipped", last)
    if counted[1] and not counted[0]:
        reasons = [re.sub(SKIPPED, "", line) for line in lines if re.match(SKIPPED, line)]
        return "not run", "; ".join(dict.fromkeys(reasons))[:200] or last
    return "ok", last if counted[0] else ""


def table(results: list[Result]) -> str:
    rows = [f"{each.name:14}{each.outcome:9}{each.seconds:7.1f} s  {each.why}" for each in results]
    count: Callable[[str], int] = [each.outcome for each in results].count
    told = f"{count('ok')} ok, {count('failed')} failed, {count('not run')} not run"
    return "\n".join([*rows, f"{told}, in {sum(each.seconds for each in results):.0f} s"])


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
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "moments"
        results = taken(asked.only, environment | {moments.VARIABLE: str(told)})
        rows = moments.rows_in(told)
    print(table(results))
    print(moments.table(rows, hostile=asked.driver == "hostile"))
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    facts = {"driver": asked.driver, "steps": [asdict(each) for each in results]}
    facts |= {"moments": [asdict(row) for row in rows]}
    asked.json.write_text(json.dumps(facts, indent=1))
    return 1 if any(each.outcome == "failed" for each in results) else 0


def taken(only: list[str] | None, environment: dict[str, str]) -> list[Result]:
    """All steps, or those of these names."""
    results: list[Result] = []
    end = time.monotonic() + LIMIT_S
    for step in STEPS:
        if only is None or step.name in only:
            print(f"-- {step.name}: {step.about}", flush=True)
            results.append(take(step, environment, end - time.monotonic()))
            print(results[-1].said, flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())

"""`make demo`: a real model answers questions over a long shared system prompt, and every tier in
turn saves the prefill. The daemon and the engines are processes of their own.

Exit code 0 only if every case hit the tier that it was meant to and every answer equals that of an
engine without a cache, by the rule for bf16 (benchmarks/equality.py). Writes build/demo.json.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmarks.equality import STEPS_MAX, Equality, compare
from benchmarks.processes import Answer, Daemon, Engine, ProcessError
from engine import demo_model

ROOT = Path(__file__).resolve().parent.parent
HANDBOOK = ROOT / "benchmarks" / "demo_prompt.md"
RESULT = ROOT / "build" / "demo.json"
MAX_TOKENS = 24  # a short answer: what the demo shows is before the first token
HIT_SHARE_MIN = 0.9  # of the prompt; what is not matched is the question and a partial block
HALF_SHARES = (0.35, 0.65)

QUESTIONS = {
    "stations": "List the three stations.",
    "lost": "Where are lost things kept, and for how long?",
    "hours": "What are the opening hours of the Harbour Station?",
    "half": "What should a guest take along on a tour?",
}


@dataclass(frozen=True)
class Case:
    """`tier`: where the whole shared prefix must be found; None: nowhere. `half`: the prompt's
    first half alone is shared."""

    name: str
    question: str
    tier: str | None
    half: bool = False

    def failure(self, answer: Answer) -> str | None:
        """Why the answer was not served as this case means it; None if it was."""
        matched, share = answer.matched_tokens, answer.matched_tokens / answer.prompt_tokens
        if matched + answer.prefilled_tokens != answer.prompt_tokens:
            return f"{matched} matched + {answer.prefilled_tokens} prefilled is not the prompt"
        if self.tier is None:
            return None if matched == 0 else f"{matched} tokens matched, none expected"
        if answer.tiers[self.tier] != matched:
            return f"expected all of the prefix in {self.tier}: {answer.tiers}"
        low, high = HALF_SHARES if self.half else (HIT_SHARE_MIN, 1.0)
        return None if low <= share <= high else f"{share:.0%} of the prompt matched"


@dataclass(frozen=True)
class Outcome:
    case: Case
    answer: Answer
    equality: Equality
    failure: str | None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.equality.equal

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "prompt_tokens": self.answer.prompt_tokens,
            "matched_tokens": self.answer.matched_tokens,
            "tiers": self.answer.tiers,
            "prefilled_tokens": self.answer.prefilled_tokens,
            "ttft_ms": self.answer.ttft_ms,
            "output_equal": self.equality.equal,
        }


class Board:
    """What has happened so far: a live table on a terminal, a line a case elsewhere."""

    def __init__(self) -> None:
        self.console = Console()
        self.outcomes: list[Outcome] = []
        self._doing = ""
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[Board]:
        if not self.console.is_terminal:
            yield self
            return
        with Live(self._table(), console=self.console, refresh_per_second=8) as self._live:
            yield self
            self.doing("")

    def doing(self, what: str) -> None:
        self._doing = what
        if self._live is not None:
            self._live.update(self._table())
        elif what:
            print(f"... {what}", flush=True)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if self._live is not None:
            self._live.update(self._table())
            return
        answer, cold = outcome.answer, self.outcomes[0].answer.ttft_ms
        found = ", ".join(f"{count} {tier}" for tier, count in answer.tiers.items() if count)
        print(
            f"{outcome.case.name}: {answer.prompt_tokens} tokens, matched {answer.matched_tokens}"
            f" ({found or 'nowhere'}), prefilled {answer.prefilled_tokens},"
            f" first token after {answer.ttft_ms:.0f} ms ({cold / answer.ttft_ms:.1f} x),"
            f" equal {outcome.equality}",
            flush=True,
        )

    def _table(self) -> Table:
        table = Table(title="one shared prompt, tier by tier", caption=self._doing or None)
        table.add_column("case", no_wrap=True)
        for name in ("prompt", "gpu", "cpu", "disk", "prefilled", "TTFT ms", "x cold"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("equal to no cache")
        for outcome in self.outcomes:
            answer = outcome.answer
            tiers = [str(answer.tiers[tier] or "") for tier in ("gpu", "cpu", "disk")]
            speed_up = f"{self.outcomes[0].answer.ttft_ms / answer.ttft_ms:.1f}"
            table.add_row(
                outcome.case.name,
                str(answer.prompt_tokens),
                *tiers,
                str(answer.prefilled_tokens),
                f"{answer.ttft_ms:.0f}",
                speed_up,
                str(outcome.equality),
                style=None if outcome.passed else "red",
            )
        return table


class Demo:
    """The daemon and the engines of one run, all in `folder`, and the answers to compare with."""

    def __init__(self, folder: Path, model: Path, board: Board, stack: ExitStack) -> None:
        self.folder, self.model, self.board, self._stack = folder, model, board, stack
        self.handbook = HANDBOOK.read_text(encoding="utf-8")
        self.references: dict[str, Answer] = {}

    def daemon(self) -> Daemon:
        daemon = Daemon(self.folder)
        self._stack.callback(daemon.stop)
        daemon.wait_ready()
        return daemon

    def engine(self, name: str, daemon: Daemon | None = None) -> Engine:
        """An engine that is loading; `ready` waits for it."""
        address = None if daemon is None else daemon.address
        engine = Engine(name, self.model, self.folder, kvc2=address)
        self._stack.callback(engine.stop)
        return engine

    def ready(self, engine: Engine) -> None:
        """Serves, and has run once: what is lazily made is made before anything is timed."""
        engine.wait_ready()
        engine.chat([{"role": "user", "content": "Hello!"}], 2)

    def messages(self, question: str) -> list[dict[str, str]]:
        system = self.handbook if question != "half" else half_shared(self.handbook)
        text = QUESTIONS[question]
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]

    def ask(self, case: Case, engine: Engine) -> None:
        self.board.doing(f"{case.name}: {QUESTIONS[case.question]}")
        answer = engine.chat(self.messages(case.question), MAX_TOKENS)
        reference = self.references[case.question]
        equality = compare(answer.tokens, reference.tokens, reference.top)
        self.board.add(Outcome(case, answer, equality, case.failure(answer)))


def half_shared(handbook: str) -> str:
    """The handbook with the sections of its second half in reverse order."""
    sections = handbook.split("\n## ")
    half = len(sections) // 2
    return "\n## ".join([*sections[:half], *reversed(sections[half:])])


def run(demo: Demo) -> None:
    """All cases in their order: each leaves the tiers as the next one needs them."""
    board = demo.board
    board.doing("starting: the daemon, an engine, and an engine without a cache to compare with")
    daemon = demo.daemon()
    uncached, engine = demo.engine("engine-uncached"), demo.engine("engine-1", daemon)
    demo.ready(uncached)
    for question in QUESTIONS:
        board.doing(f"without a cache: {QUESTIONS[question]}")
        demo.references[question] = uncached.chat(demo.messages(question), MAX_TOKENS)
    uncached.stop()
    demo.ready(engine)
    daemon.wait_sessions(1)

    demo.ask(Case("cold", "stations", tier=None), engine)
    demo.ask(Case("gpu hit", "lost", tier="gpu"), engine)
    board.doing("kvc2 flush; kvc2 evict --tier gpu")
    daemon.wait_released()
    daemon.flush()
    daemon.evict("gpu")
    demo.ask(Case("cpu hit", "hours", tier="cpu"), engine)
    board.doing("kvc2 flush; kvc2 evict --tier gpu; kvc2 evict --tier cpu")
    daemon.wait_released()
    daemon.flush()
    daemon.evict("gpu", "cpu")
    demo.ask(Case("disk hit", "stations", tier="disk"), engine)

    board.doing("kill -9 of the daemon and the engine; both start again")
    daemon.flush()
    daemon.kill()
    engine.kill()
    daemon = demo.daemon()
    engine = demo.engine("engine-2", daemon)
    demo.ready(engine)
    daemon.wait_sessions(1)
    demo.ask(Case("disk hit after kill -9", "lost", tier="disk"), engine)
    board.doing("a second engine starts")
    second = demo.engine("engine-3", daemon)
    demo.ready(second)
    daemon.wait_sessions(2)
    # the same question: a block of another one may have stayed on disk when the prefix came to cpu
    demo.ask(Case("second engine", "lost", tier="cpu"), second)
    demo.ask(Case("half of the prefix", "half", tier="gpu", half=True), second)


def report(board: Board, seconds: float) -> bool:
    """Prints what was said and what went wrong, writes the JSON; whether all is well."""
    for question, text in QUESTIONS.items():
        said = [outcome for outcome in board.outcomes if outcome.case.question == question]
        if said:
            board.console.print(f"\n[bold]{text}[/bold]\n{said[0].answer.text.strip()}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    rows = [outcome.as_json() for outcome in board.outcomes]
    RESULT.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    same = sum(outcome.equality.how == "tokens" for outcome in board.outcomes)
    ties = sum(outcome.equality.how == "tie" for outcome in board.outcomes)
    count = len(board.outcomes)
    board.console.print(
        f"\n{count} cases in {seconds:.0f} s: {same} answers equal token for token, {ties} parted"
        f" at a tie of at most {STEPS_MAX} bf16 steps, {count - same - ties} differ."
        f" The figures are in {RESULT}."
    )
    for outcome in board.outcomes:
        if outcome.failure:
            board.console.print(f"[red]{outcome.case.name}: {outcome.failure}[/red]")
    return all(outcome.passed for outcome in board.outcomes)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children end too
    begin = time.monotonic()
    with demo_model.console_progress() as progress:
        model = demo_model.build(demo_model.default_directory(), progress=progress)
    board = Board()
    passed = guarded(lambda stack, folder: run(Demo(folder, model, board, stack)), board)
    return 0 if report(board, time.monotonic() - begin) and passed else 1


def guarded(body: Callable[[ExitStack, Path], None], board: Board) -> bool:
    """Runs the cases in a temporary folder; ends what they started. False if a process failed."""
    with tempfile.TemporaryDirectory(prefix="kvc2-demo-") as name, ExitStack() as stack:
        try:
            with board.shown():
                body(stack, Path(name))
        except ProcessError as error:
            board.console.print(f"[red]{error}[/red]", markup=True)
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())

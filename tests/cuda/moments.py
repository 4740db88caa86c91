"""When a request's first token came, and when each layer of its prefix was told to be there.

The daemon, or the worker that copies for it, stores how far a transfer is in a page that it shares
with the engine. Watch maps the same page and looks at it while a request is under way, so that
neither process is changed: what it sees is later than the truth by up to LOOK_S. `tell` keeps rows
in the file that KVC2_MOMENTS names, for the table of `make cuda-check`; without it, nowhere.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvc2.client.memory import LAYERS_MAX
from tests.system.engine import Answer, EngineProcess, greedy

LOOK_S = 1e-4
VARIABLE = "KVC2_MOMENTS"


@dataclass(frozen=True)
class Seen:
    """A progress word, and when it was seen first."""

    at_s: float
    word: int

    @property
    def transfer(self) -> int:
        return self.word // LAYERS_MAX

    @property
    def layers(self) -> int:
        return self.word % LAYERS_MAX


class Watch:
    """Of an engine's transfers, while a `with` runs. `seen`: each change of a progress word."""

    def __init__(self, pid: int) -> None:
        self._words = [_word(path) for path in _progress_pages(pid)]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.seen: list[Seen] = []

    def _look(self) -> None:
        last = [int(word[0]) for word in self._words]
        while True:
            over = self._done.is_set()  # asked first: what was told before then is seen
            for number, word in enumerate(self._words):
                if (now := int(word[0])) != last[number]:
                    self.seen.append(Seen(time.perf_counter(), now))
                    last[number] = now
            if over:
                return
            time.sleep(LOOK_S)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _progress_pages(pid: int) -> list[Path]:
    """Those that a process holds: one of the session that it has, and of earlier ones for which
    somebody may still wait."""
    found = {}
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(each).startswith("/memfd:kvc2-progress"):
                found[each.stat().st_ino] = each  # a map of it has a descriptor too
    return list(found.values())


def _word(path: Path) -> np.ndarray[Any, Any]:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ), "<u8", 1)


@dataclass(frozen=True)
class Timed:
    """An answer, and what came when, in milliseconds after the request was sent. `layers_ms`: by
    layer, of the last transfer: earlier ones were whole by then. Empty: nothing was copied."""

    answer: Answer
    first_token_ms: float
    layers_ms: tuple[float, ...]
    transfers: int


def timed(engine: EngineProcess, tokens: list[int]) -> Timed:
    """A greedy answer as `EngineProcess.complete` has it, in a stream: each token is a piece."""
    body = greedy(engine.model_name, tokens, 8) | {"stream": True, "logprobs": 0}
    arrived, pieces = [], []
    with Watch(engine.process.pid) as watch:
        began = time.perf_counter()
        with engine.http.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    arrived.append(time.perf_counter())
                    pieces.append(json.loads(line.removeprefix("data: ")))
    assert reply.status_code == 200, pieces
    transfers = {each.transfer for each in watch.seen}
    layers = by_layer([each for each in watch.seen if each.transfer == max(transfers)])
    told = tuple(round((at_s - began) * 1e3, 3) for at_s in layers)
    first_ms = round((arrived[0] - began) * 1e3, 3)
    return Timed(Answer(pieces[-1]), first_ms, told, len(transfers))


def by_layer(seen: Sequence[Seen]) -> list[float]:
    """Of one transfer: several layers may be told at once, or between two looks."""
    layers = seen[-1].layers if seen else 0
    return [next(each.at_s for each in seen if each.layers > layer) for layer in range(layers)]


@dataclass(frozen=True)
class Row:
    """Of the table: medians of `runs` answers whose prefix came from the same place."""

    name: str
    matched: int
    runs: int
    first_token_ms: float
    layers_ms: tuple[float, ...]


def tell(name: str, runs: Sequence[Timed]) -> None:
    """Keeps a row, where somebody wants one."""
    if not (path := os.environ.get(VARIABLE)):
        return
    layers = zip(*(each.layers_ms for each in runs), strict=True)
    row = Row(
        name,
        runs[0].answer.matched,
        len(runs),
        statistics.median(each.first_token_ms for each in runs),
        tuple(statistics.median(layer) for layer in layers),
    )
    with Path(path).open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def rows_in(path: Path) -> list[Row]:
    """All that was told."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def table(rows: Sequence[Row], *, hostile: bool) -> str:
    """In milliseconds after a request was sent."""
    if not rows:
        return ""
    where = "the hostile driver on a CPU: no figures of a GPU" if hostile else "this device"
    head = f"end: milliseconds after a request was sent, medians, of {where}"
    names = (
        f"  {'its prefix comes from':32}{'tokens':>7}{'runs':>6}{'first token':>13}  layers told"
    )
    lines = [
        f"  {row.name:28}{row.matched:7}{row.runs:6}{row.first_token_ms:13.1f}  "
        + (" ".join(f"{each:.1f}" for each in row.layers_ms) or "none is copied")
        for row in rows
    ]
    return "\n".join([head, names, *lines])

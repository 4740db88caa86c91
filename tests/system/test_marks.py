"""`cache_control` over HTTP, with a real daemon and engine: what it keeps, for how long, and what
usage says. The daemon's clock runs ahead as a file tells it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvc2.client import DaemonStats
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess
from tests.system.engine import EngineProcess, small_model

BLOCK = 16
AHEAD = """
import pathlib, sys
from kvc2.cache import ticker
seconds = ticker.Seconds.__call__
ahead = pathlib.Path({path!r})
ticker.Seconds.__call__ = lambda self: seconds(self) + int(ahead.read_text())
from kvc2.commands.cli import main
main()
"""


@dataclass
class Served:
    daemon: DaemonProcess
    engine: EngineProcess
    ahead: Path

    def ask(self, text: str, mark: str | None = None) -> dict[str, int]:
        """The usage of a short answer to a text, which is marked."""
        block: dict[str, Any] = {"type": "text", "text": text}
        if mark is not None:
            block["cache_control"] = {"type": "ephemeral", "ttl": mark}
        body = {"model": self.engine.model_name, "max_tokens": 1, "temperature": 0}
        body["messages"] = [{"role": "user", "content": [block]}]
        reply = self.engine.http.post("/v1/messages", json=body)
        assert reply.status_code == 200, reply.text
        usage: dict[str, int] = reply.json()["usage"]
        return usage

    def press(self, kept_blocks: int) -> None:
        """The arena alone holds blocks, and only so many of those that it held."""
        with self.daemon.admin() as admin:

            def busy() -> dict[str, int]:  # what is copied, in the background, can't be evicted
                stats = admin.stats()
                moving = sum(each.in_flight_pages + each.pinned_pages for each in stats.tiers)
                uncopied = stats.blocks - self._held(stats)
                return {"moving": moving, "uncopied": uncopied, "leases": stats.leases}

            with suppress(AssertionError):
                wait_until(lambda: not any(busy().values()), 30)
            assert not any(busy().values()), busy()
            admin.evict("gpu")
            admin.evict("cpu", self._held(admin.stats()) - kept_blocks)

    @staticmethod
    def _held(stats: DaemonStats) -> int:
        return next(each.resident_pages for each in stats.tiers if each.tier == "cpu")

    def later(self, seconds: int) -> None:
        then = self.ahead.with_suffix(".then")
        then.write_text(str(int(self.ahead.read_text()) + seconds))
        then.replace(self.ahead)  # the daemon reads it all the while


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    ahead = folder / "ahead"
    ahead.write_text("0")
    # a hit is one still where a busy machine makes a tier slower than this model
    loads = ("--load-policy", "always", "--acquire-deadline-ms", "20000")
    python = ("-c", AHEAD.format(path=str(ahead)))
    model = small_model(folder / "model")
    with DaemonProcess(folder, *loads, python=python) as daemon:
        flags = ("--kvc2", daemon.address, "--num-pages", "160", "--chunk-size", "64")
        with EngineProcess(model, folder / "engine.log", *flags) as engine:
            engine.wait_attached()
            yield Served(daemon, engine, ahead)


def text(letter: str) -> str:
    return 400 * letter


def whole(usage: dict[str, int]) -> int:
    cached = usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    return usage["input_tokens"] + cached


def test_a_marked_prompt_outlives_what_an_unmarked_one_does_not(served: Served) -> None:
    first = served.ask(text("a"), "5m")
    full = whole(first) // BLOCK
    assert first["cache_read_input_tokens"] == 0
    assert first["cache_creation_input_tokens"] == full * BLOCK
    assert served.ask(text("b"))["cache_creation_input_tokens"] == full * BLOCK
    again = served.ask(text("b"))
    assert (again["cache_creation_input_tokens"], again["cache_read_input_tokens"]) == (
        0,
        full * BLOCK,
    )
    marked = 400 // BLOCK
    served.press(marked)
    kept = served.ask(text("a"))
    assert kept["cache_read_input_tokens"] >= marked * BLOCK
    assert served.ask(text("b"))["cache_read_input_tokens"] == 0


@pytest.mark.parametrize(("mark", "seconds", "later"), [("5m", 300, "c"), ("1h", 3600, "d")])
def test_a_pin_ends(served: Served, mark: str, seconds: int, later: str) -> None:
    """Then a later mark's prompt is kept before it; a second sooner, both were."""
    marked = 400 // BLOCK
    served.later(4000)  # than all pins of other tests
    served.ask(text(later), mark)
    served.later(seconds - 10)
    served.press(marked)
    assert served.ask(text(later))["cache_read_input_tokens"] >= marked * BLOCK
    served.later(20)
    served.ask(text(later.upper()), mark)
    served.press(marked)
    assert served.ask(text(later.upper()))["cache_read_input_tokens"] >= marked * BLOCK
    assert served.ask(text(later))["cache_read_input_tokens"] == 0


def test_a_silent_daemon_keeps_nothing_and_the_request_goes_on(served: Served) -> None:
    served.daemon.freeze()
    try:
        for letter in "ef":  # while it is waited for, and when it is given up
            usage = served.ask(text(letter), "5m")
            assert usage["cache_creation_input_tokens"] == 0
            assert usage["cache_read_input_tokens"] == 0
            assert usage["input_tokens"] > 400
        served.engine.wait_attached(False)
    finally:
        served.daemon.thaw()
    served.engine.wait_attached()
    assert served.ask(text("g"), "5m")["cache_creation_input_tokens"] > 0

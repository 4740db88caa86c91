"""The scheduler's thread: what was taken is answered, whatever ends it, and then nothing more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.request import Bounds, Output, Request, SamplingParams
from engine.worker import StoppedError, TooBusyError, Worker
from tests.doubles.engine_doubles import VOCABULARY, House, NoText, build, expected_tokens

PROMPT = [5, 6, 7]


class Caller:
    """A request, and the wait for its end."""

    def __init__(self, request_id: str = "r", max_tokens: int = 4) -> None:
        self.outputs: list[Output] = []
        self.ended = threading.Event()
        self.request = Request(
            request_id=request_id,
            tokens=np.array(PROMPT, np.uint32),
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=0),
            text=NoText(),
            deliver=self.deliver,
        )

    def deliver(self, output: Output) -> None:
        self.outputs.append(output)
        if output.finish is not None:
            self.ended.set()

    def last(self) -> Output:
        assert self.ended.wait(10), "no answer"
        return self.outputs[-1]


class Gate:
    """Holds the scheduler's thread inside a step until `open`; then the step may fail."""

    def __init__(self, house: House) -> None:
        self.entered, self.opened, self.fails = threading.Event(), threading.Event(), False
        self._step = house.scheduler.step
        house.scheduler.step = self.step  # type: ignore[method-assign]

    def step(self) -> bool:
        if self._step():
            self.entered.set()
            assert self.opened.wait(10)
            if self.fails:
                raise RuntimeError("a bug")
            return True
        return False


@pytest.fixture
def house() -> House:
    return build(daemon=False)


@pytest.fixture
def gate(house: House) -> Gate:
    return Gate(house)


@pytest.fixture
def worker(house: House, gate: Gate) -> Iterator[Worker]:
    worker = Worker(house.scheduler, 2, Bounds(VOCABULARY, context_tokens=100))
    worker.start()
    yield worker
    gate.opened.set()
    worker.stop(10)


def test_a_request_is_answered_and_more_than_fit_are_told_so(worker: Worker, gate: Gate) -> None:
    first, second, third = Caller("a"), Caller("b"), Caller("c")
    worker.submit(first.request)
    assert gate.entered.wait(10)
    worker.submit(second.request)
    with pytest.raises(TooBusyError, match="2 requests"):
        worker.submit(third.request)
    assert worker.healthy
    gate.opened.set()
    for caller in (first, second):
        assert caller.last().finish == "length"
        assert [o.token_id for o in caller.outputs] == expected_tokens(PROMPT, 4)


@pytest.mark.parametrize("fails", [False, True], ids=["stopped", "failed"])
def test_what_was_taken_is_answered_when_the_thread_ends(
    worker: Worker, gate: Gate, fails: bool
) -> None:
    running, queued = Caller("a", 30), Caller("b")
    worker.submit(running.request)
    assert gate.entered.wait(10)
    worker.submit(queued.request)  # behind a step that is under way
    worker.cancel("unknown")
    gate.fails = fails
    if not fails:
        ending = threading.Thread(target=worker.stop, args=(10,))
        ending.start()
        while worker.healthy:
            pass
        with pytest.raises(StoppedError):  # the thread still runs, but not for this one
            worker.submit(Caller("c").request)
    gate.opened.set()
    for caller in (running, queued):
        last = caller.last()
        assert (last.finish, last.unavailable) == ("error", True)
        assert ("failed" if fails else "stopping") in (last.error or "")
    worker.stop(10)
    assert not worker.healthy
    worker.cancel("a")
    with pytest.raises(StoppedError):
        worker.submit(Caller("d").request)


def test_a_request_that_can_not_be_added_is_answered_and_ends_nobody_else(
    house: House, worker: Worker, gate: Gate
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    add, house.scheduler.add = house.scheduler.add, broken  # type: ignore[method-assign]
    caller = Caller()
    worker.submit(caller.request)
    assert caller.last().finish == "error"
    house.scheduler.add = add  # type: ignore[method-assign]
    gate.opened.set()
    after = Caller("after")
    worker.submit(after.request)
    assert after.last().finish == "length"
    assert worker.healthy


def test_a_failure_is_told_after_everything_is_answered(worker: Worker, gate: Gate) -> None:
    told = threading.Event()
    caller = Caller()

    def on_failure() -> None:
        assert caller.ended.is_set()
        told.set()

    worker.on_failure = on_failure
    worker.submit(caller.request)
    assert gate.entered.wait(10)
    gate.fails = True
    gate.opened.set()
    assert told.wait(10)
    assert worker.failed


def test_to_be_stopped_is_no_failure(worker: Worker) -> None:
    worker.on_failure = lambda: pytest.fail("it was stopped in order")
    worker.stop(10)
    assert not worker.failed


def test_each_request_is_answered_even_if_nothing_can_be_freed(
    house: House, worker: Worker, gate: Gate
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("a bug")

    first, second = Caller("a", 30), Caller("b", 30)
    worker.submit(first.request)
    assert gate.entered.wait(10)
    worker.submit(second.request)
    house.bridge.release = broken  # type: ignore[method-assign]
    gate.fails = True
    gate.opened.set()
    assert first.last().unavailable
    assert second.last().unavailable

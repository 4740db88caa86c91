"""How `make cuda-check` judges its steps, and what it sees of a transfer's layers."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvc2.client.memory import LAYERS_MAX
from tests.cuda import check, moments
from tests.cuda.check import Step, judged, take
from tests.cuda.moments import Row, Watch
from tests.doubles.waiting import wait_until


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (0, "device A\n", ("ok", "")),
        (0, "..\n7 passed in 2.00s", ("ok", "7 passed in 2.00s")),
        (
            0,
            "SKIPPED [1] a.py:3: no time\n6 passed, 1 skipped in 2s",
            ("ok", "6 passed, 1 skipped in 2s"),
        ),
        (
            0,
            "ss\nSKIPPED [2] a.py:3: no CUDA\nSKIPPED [1] a.py:9: no CUDA\n3 skipped in 2s",
            ("not run", "no CUDA"),
        ),
        (check.NOT_RUN, "libcuda.so.1: cannot open\n", ("not run", "libcuda.so.1: cannot open")),
        (1, "x\nE   assert 1 == 2\nFAILED a.py::b\n1 failed", ("failed", "E   assert 1 == 2")),
        (-11, "", ("failed", "it said nothing")),
        (-1, "half\nmore than 3 s", ("failed", "more than 3 s")),
    ],
)
def test_a_step_is_judged_by_its_exit_code_and_its_words(
    code: int, said: str, expected: tuple[str, str]
) -> None:
    assert judged(code, said) == expected


def test_a_step_ends_at_its_limit_and_fails() -> None:
    sleeps = Step(
        "sleeps", 1, ("-c", "print('began', flush=True); import time; time.sleep(60)"), ""
    )
    found = take(sleeps, dict(os.environ), 100)
    assert (found.outcome, found.why) == ("failed", "more than 1 s")
    assert "began" in found.said


def test_a_step_for_which_no_time_is_left_fails_without_a_start() -> None:
    found = take(Step("late", 10, ("-c", "print('it ran')"), ""), dict(os.environ), -0.5)
    assert (found.outcome, found.said) == ("failed", "")


@pytest.fixture
def word() -> Iterator[np.ndarray]:
    """The progress word of a page that this process holds, as an engine does."""
    fd = os.memfd_create("kvc2-progress")
    os.ftruncate(fd, mmap.PAGESIZE)
    yield np.frombuffer(mmap.mmap(fd, mmap.PAGESIZE), "<u8", 1)
    os.close(fd)


def test_each_layer_has_the_moment_at_which_it_was_seen(word: np.ndarray) -> None:
    told = [5 * LAYERS_MAX + layers for layers in (1, 3, 4)]  # two of them at once
    word[0] = 4 * LAYERS_MAX + 2
    with Watch(os.getpid()) as watch:
        for count, each in enumerate(told, 1):
            word[0] = each
            wait_until(lambda count=count: len(watch.seen) == count)
    assert [each.word for each in watch.seen] == told
    first, second, third = (each.at_s for each in watch.seen)
    assert moments.by_layer(watch.seen) == [first, second, second, third]
    assert first < second < third


def test_what_was_told_before_the_end_is_seen(word: np.ndarray) -> None:
    with Watch(os.getpid()) as watch:
        word[0] = LAYERS_MAX + 3
    assert [(each.transfer, each.layers) for each in watch.seen] == [(1, 3)]


def test_the_table_says_whose_figures_they_are(tmp_path: Path) -> None:
    rows = [Row("cpu", 288, 5, 41.26, (3.14, 4.0)), Row("gpu", 288, 5, 30.0, ())]
    told = moments.table(rows, hostile=True)
    assert "no figures of a GPU" in told
    assert "no figures" not in moments.table(rows, hostile=False)
    _, _, cpu, gpu = told.splitlines()
    assert cpu.split() == ["cpu", "288", "5", "41.3", "3.1", "4.0"]
    assert gpu.endswith("none is copied")
    assert moments.table([], hostile=True) == ""
    assert moments.rows_in(tmp_path / "nobody told") == []

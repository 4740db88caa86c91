"""The laws of laws/ on the hostile driver: several seeds, late and not, each run in a process of
its own."""

from __future__ import annotations

import pytest

from tests.cuda import hostile

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
MOODS = {
    "seed 1, late": (1, "seed=1,late_us=400"),
    "seed 2, very late": (2, "seed=2,late_us=2000"),
    "seed 3, at once": (3, "seed=3,late_us=0"),
}


@pytest.mark.parametrize("mood", MOODS)
def test_copies_obey_their_laws(mood: str) -> None:
    seed, words = MOODS[mood]
    laws = "tests/cuda/laws/mover_laws.py"
    said = hostile.run(*PYTEST, laws, hostile=words, KVC2_SEED=str(seed))
    assert "skipped" not in said, said


@pytest.mark.parametrize("mood", list(MOODS)[:2])
def test_workers_meet_the_executors_contract_and_survive_every_death(mood: str) -> None:
    seed, words = MOODS[mood]
    laws = "tests/cuda/laws/executor_laws.py"
    said = hostile.run(*PYTEST, laws, hostile=words, limit_s=280, KVC2_SEED=str(seed))
    assert "skipped" not in said, said


@pytest.mark.parametrize("mood", list(MOODS)[:2])
def test_streams_call_the_host_in_their_order(mood: str) -> None:
    _, words = MOODS[mood]
    said = hostile.run(*PYTEST, "tests/cuda/laws/host_call_laws.py", hostile=words)
    assert "skipped" not in said, said


def test_faults_and_mistakes_are_seen_and_leave_nothing() -> None:
    said = hostile.run(*PYTEST, "tests/cuda/laws/fault_laws.py", hostile="seed=4,late_us=300")
    assert "skipped" not in said, said

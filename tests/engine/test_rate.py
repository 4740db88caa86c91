"""What fits beside decodes, on machines whose steps take a time by a formula."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from engine.rate import ALONE_EVERY, LEAST, UNMEASURED, MixedSteps, PrefillRate

MOST = 256


def mixed_steps(stretch: float = 2.5, most: int = MOST, rate: float | None = None) -> MixedSteps:
    """`rate`: of prefill, tokens/s."""
    known = PrefillRate(MOST, lambda _: None)
    known.tokens_per_s = rate
    return MixedSteps(stretch, most, known)


@dataclass(frozen=True)
class Machine:
    """Seconds: of a step with any decodes, more for each, more where it prefills, more a token."""

    a_step: float
    a_decode: float
    a_chunk: float
    a_token: float

    def takes(self, decodes: int, prefilled: int) -> float:
        beside = self.a_chunk + self.a_token * prefilled if prefilled else 0.0
        return self.a_step + self.a_decode * decodes + beside


machines = st.builds(
    Machine,
    a_step=st.floats(0.002, 0.1),
    a_decode=st.floats(0.0, 0.02),
    a_chunk=st.floats(0.0, 0.05),
    a_token=st.floats(1e-5, 0.02),
)


@given(machines, st.floats(1.5, 10), st.integers(1, 64))
def test_a_mixed_step_takes_no_longer_than_it_may(
    machine: Machine, stretch: float, decodes: int
) -> None:
    """Once steps of both kinds were seen; and half as much again would not fit, if anything does
    that is more than the least."""
    mixed = mixed_steps(stretch)
    allowed = stretch * machine.takes(decodes, 0)
    assert mixed.tokens(decodes) == 0
    sizes = []
    for _ in range(40):
        mixed.measured(decodes, 0, machine.takes(decodes, 0))
        sizes.append(mixed.tokens(decodes))
        mixed.measured(decodes, sizes[-1], machine.takes(decodes, sizes[-1]))
    for size in sizes[20:]:
        assert size == LEAST or machine.takes(decodes, size) <= allowed * 1.0001
    if max(sizes[20:]) == LEAST:
        assert machine.takes(decodes, 4 * LEAST) > allowed
    assert all(LEAST <= each <= MOST and each & (each - 1) == 0 for each in sizes)


@given(machines, st.floats(1.5, 10), st.integers(1, 64))
def test_what_decodes_take_alone_is_learned_while_prompts_never_stop(
    machine: Machine, stretch: float, decodes: int
) -> None:
    mixed, sizes = mixed_steps(stretch), []
    for _ in range(2 * ALONE_EVERY):
        sizes.append(mixed.tokens(decodes))
        mixed.measured(decodes, sizes[-1], machine.takes(decodes, sizes[-1]))
    assert [i for i, size in enumerate(sizes) if size == 0] == [0, ALONE_EVERY]
    allowed = stretch * machine.takes(decodes, 0) * 1.0001
    assert all(size == LEAST or machine.takes(decodes, size) <= allowed for size in sizes[-8:])


def test_a_step_that_was_disturbed_changes_nothing() -> None:
    mixed = mixed_steps()
    assert mixed.tokens(4) == 0
    for disturbed in (1, 1, 1, 50, 1, 1, 1):
        mixed.measured(4, 0, 0.040 * disturbed)
        mixed.measured(4, 16, 0.040 * disturbed + 16 * 0.002)
    assert mixed.tokens(4) == 16  # 0.06 s beside them, of which 30 tokens take as much


def test_what_was_not_measured_is_as_the_most_like_it() -> None:
    unknown, known = mixed_steps(), mixed_steps(rate=1000.0)
    for decodes in (1, 2, 8, 16):
        assert unknown.tokens(decodes) == known.tokens(decodes) == 0
    assert unknown.tokens(1) == known.tokens(1) == UNMEASURED
    for each in (unknown, known):
        each.measured(1, 0, 0.02)
    assert unknown.tokens(1) == UNMEASURED
    assert known.tokens(1) == known.tokens(2) == 16  # 0.03 s at that rate
    known.measured(16, 0, 0.1)
    assert known.tokens(16) == known.tokens(12) == 128
    assert known.tokens(2) == 16


def test_no_more_than_the_most() -> None:
    for rate in (1e6, 1e-3):
        mixed = mixed_steps(most=4, rate=rate)
        assert mixed.tokens(1) == 0
        assert mixed.tokens(1) == 4
        mixed.measured(1, 0, 1.0)
        assert mixed.tokens(1) == 4


def test_the_rate_is_told_of_all_steps() -> None:
    told: list[float] = []
    MixedSteps(2.5, MOST, PrefillRate(MOST, told.append)).measured(0, MOST, 0.5)
    assert told == [2 * MOST]

"""The numbered laws of csrc/index: what is stated is proved, by its number, and counted alike.

The index states I1, I2, ... in index.h, the leases L1, ... in leases.h, the transfers T1, ... in
transfers.h; the proofs are in check.cpp.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

INDEX = ROOT / "csrc/index"
STATED_IN = {"I": INDEX / "index.h", "L": INDEX / "leases.h", "T": INDEX / "transfers.h"}
PROVED_IN = INDEX / "check.cpp"
TELL_THE_RANGE = [INDEX / "README.md", PROVED_IN, ROOT / "kvc2/_core.pyi"]
NUMBER_WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
                "eleven", "twelve", "thirteen", "fourteen", "fifteen"]  # fmt: skip


def stated(kind: str) -> list[int]:
    """The numbers of the laws of a header, as they come there."""
    text = STATED_IN[kind].read_text()
    return [int(number) for number in re.findall(rf"^//   {kind}(\d+) [A-Z]", text, re.MULTILINE)]


def laws() -> set[str]:
    return {f"{kind}{number}" for kind in STATED_IN for number in stated(kind)}


def checks(text: str) -> Iterator[str]:
    """Of each KVC2_CHECK its message, the first string in it."""
    for call in text.split("KVC2_CHECK(")[1:]:
        message = re.search(r'"([^"]*)"', call)
        assert message is not None, call
        yield message[1]


def texts() -> list[Path]:
    """What people read of the core: its sources, its contract, its tests, the READMEs."""
    endings = {".h", ".cpp", ".md", ".py", ".pyi"}
    folders = [ROOT / "csrc", ROOT / "kvc2", ROOT / "tests"]
    found = [path for folder in folders for path in folder.rglob("*.*") if path.suffix in endings]
    return [ROOT / "README.md", *(path for path in found if path != Path(__file__))]


@pytest.mark.parametrize("kind", STATED_IN)
def test_laws_are_numbered_without_a_gap(kind: str) -> None:
    assert stated(kind) == list(range(1, len(stated(kind)) + 1))
    assert len(stated(kind)) >= 3


def test_every_law_that_is_stated_is_proved_by_its_number_and_no_other() -> None:
    proved = {message.partition(":")[0] for message in checks(PROVED_IN.read_text())}
    assert proved == laws()


def test_every_check_that_names_a_law_names_one_that_is_stated() -> None:
    named = {
        law
        for path in INDEX.rglob("*.cpp")
        for message in checks(path.read_text())
        for law in re.findall(r"^[ILT]\d+(?=:)", message)
    }
    assert laws() >= named


def test_comments_of_the_index_cite_only_laws_that_are_stated() -> None:
    wrong = [
        f"{path.name}: {law}"
        for path in [*INDEX.rglob("*.*"), ROOT / "kvc2/_core.pyi"]
        for law in re.findall(r"\b[ILT]\d+\b", path.read_text())
        if law not in laws()
    ]
    assert not wrong


def test_every_text_counts_the_laws_alike() -> None:
    wrong = []
    for path in texts():
        for kind, last in re.findall(r"\b([ILT])1 ?[-\u2013] ?[ILT]?(\d+)\b", path.read_text()):
            if int(last) != len(stated(kind)):
                wrong.append(f"{path}: {kind}1-{kind}{last}, not {len(stated(kind))}")
    assert not wrong
    for path in TELL_THE_RANGE:
        assert f"I1-I{len(stated('I'))}" in path.read_text(), path


def test_no_text_counts_the_laws_of_the_index_in_words() -> None:
    """Such a count would be one more place to change; the ranges above are tested."""
    counted = re.compile(rf"\b({'|'.join(NUMBER_WORDS)}|\d+) (numbered )?laws\b", re.IGNORECASE)
    wrong = {path: counted.search(path.read_text()) for path in texts()}
    assert not {path: found[0] for path, found in wrong.items() if found}

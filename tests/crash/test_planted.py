"""The planted bugs fit the tree as it is: planted.py, which takes long, runs seldom."""

from __future__ import annotations

import ast

import pytest

from tests.crash.bugs import Bug
from tests.crash.planted import BUGS, HOUSE, changed


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_fits_the_tree(bug: Bug) -> None:
    ast.parse(changed(bug, (HOUSE / bug.file).read_text()))

"""What is brought to a host without a network: all that is asked for, but what is there."""

from __future__ import annotations

import tomllib

from tests import ROOT
from tests.cuda.wheels import BUILD, CHECKS, EXTRAS, THERE, name_of, wanted


def test_all_that_is_asked_for_is_there_or_brought() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = {name_of(each) for each in project["project"]["dependencies"]}
    asked |= {name_of(each) for extra in EXTRAS for each in extras[extra]}
    asked |= {name_of(each) for each in project["build-system"]["requires"]}
    brought = {name_of(each) for each in wanted()}
    assert asked - brought - THERE == {"flashinfer-python"}  # it comes without what it asks for
    assert not brought & THERE
    assert {*BUILD, *CHECKS} <= brought

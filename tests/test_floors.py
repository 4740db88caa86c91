"""The generated code refuses older runtimes: what pyproject.toml asks for must be new enough."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests import ROOT


def asked(package: str) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    (found,) = [line for line in lines if re.split("[=>]", line)[0] == package]
    return re.split("[=>]=", found)[1]


def written(file: str, pattern: str) -> str:
    found = re.search(pattern, (ROOT / "kvc2/v1" / file).read_text())
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    "package", ["grpcio", "grpcio-tools", "grpcio-health-checking", "grpcio-reflection"]
)
def test_grpc_is_asked_for_as_generated(package: str) -> None:
    generator = written("cache_pb2_grpc.py", r"GRPC_GENERATED_VERSION = '([\d.]+)'")
    assert asked(package) == generator


def test_protobuf_is_asked_for_as_generated() -> None:
    generator = written("cache_pb2.py", r"Protobuf Python Version: ([\d.]+)")
    assert asked("protobuf") == generator

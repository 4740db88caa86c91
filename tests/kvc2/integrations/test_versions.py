"""An engine that nobody has tried is told, and served."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest

from kvc2.integrations import versions


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ({"engine-cpu": "0.5.6"}, []),
        ({"engine": "0.5.1", "engine-cpu": "0.9"}, []),
        ({"engine": "0.50.1"}, ["kvc2: tried with Engine 0.5, not with 0.50.1"]),
        ({"other": "0.5.6"}, ["kvc2: tried with Engine 0.5; this one doesn't say which it is"]),
    ],
)
def test_what_nobody_has_tried_is_told(
    installed: dict[str, str],
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    caplog.set_level(logging.WARNING)
    versions.check("Engine", "0.5", "engine", "engine-cpu")
    assert caplog.messages == told

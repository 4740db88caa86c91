"""Keys change without a restart; each answer has an id; CORS and the access log are asked for."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse

from engine.http.keys import file_keys
from engine.http.outside import with_cors, with_ids
from kvc2.errors import InvalidConfig
from kvc2.keyring import LOOK_S
from tests.doubles.engine_doubles import Clock


def test_keys_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.yaml", Clock()
    path.write_text("a: one\n")
    keys = file_keys(path, clock)
    assert keys.needed
    assert (keys.owner("a"), keys.owner("b")) == ("one", None)
    path.write_text("b: two\n")
    os.utime(path, ns=(1, 1))
    assert keys.owner("b") is None  # it was looked at a moment ago
    clock.now += LOOK_S
    assert (keys.owner("a"), keys.owner("b")) == (None, "two")


@pytest.mark.parametrize("text", ["", "[", "b: 3\n", None])
def test_a_file_that_can_not_be_read_keeps_the_last_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    path, clock = tmp_path / "keys.yaml", Clock()
    path.write_text("a: one\n")
    keys = file_keys(path, clock)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    for _ in range(2):
        clock.now += LOOK_S
        assert keys.owner("a") == "one"
    assert caplog.text.count("stay as they were") == 1
    if text is not None:
        with pytest.raises(InvalidConfig):
            file_keys(path, clock)


app = PlainTextResponse("yes")


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("", False), ("a b", False), ("x" * 129, False)]
)
def test_an_answer_has_the_callers_id_or_one_of_ours(given: str, kept: bool) -> None:
    client = TestClient(with_ids(app, access_log=False))
    answer = client.get("/", headers={"x-request-id": given})
    found = answer.headers["x-request-id"]
    assert (found == given) is kept
    assert len(found) in (len(given), 32)


@pytest.mark.parametrize("access_log", [False, True])
def test_the_access_log_is_off_unless_it_is_asked_for(
    access_log: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = TestClient(with_ids(app, access_log=access_log))
    client.get("/some/path", headers={"x-request-id": "abc"})
    lines = [each.getMessage() for each in caplog.records if "abc" in each.getMessage()]
    assert len(lines) == access_log
    if access_log:
        assert lines[0].startswith("GET '/some/path' 200 ")


def test_pages_of_named_origins_may_ask() -> None:
    client = TestClient(with_cors(app, "https://a.example, https://b.example"))
    for origin, allowed in [("https://b.example", True), ("https://c.example", False)]:
        answer = client.get("/", headers={"origin": origin})
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed

"""A flag is written once: its option, key, help and errors are made of its field."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from engine.settings import EngineConfig
from kvc2 import flags
from kvc2.commands import cli
from kvc2.config import ServeConfig, TenantConfig
from kvc2.errors import InvalidConfig
from kvc2.flags import Allowed, Flag


@dataclass(frozen=True)
class Shelf:
    name: Annotated[str, Flag("Its name.", flags.matching("[a-z]+", "small letters"))]
    ids: Annotated[tuple[int, ...], Flag("Who may open it.")] = ()

    def __post_init__(self) -> None:
        flags.check(self, "shelves")


@dataclass(frozen=True)
class Room:
    size_gb: Annotated[float | None, Flag("How big.", flags.above(0), "any", "5")] = None
    path: Annotated[Path | None, Flag("Where.", shown="nowhere", example="/x")] = None

    def __post_init__(self) -> None:
        flags.check(self, "room")


@dataclass(frozen=True)
class House:
    rooms: Annotated[int, Flag("How many.", flags.between(1, 9))] = 2
    open: Annotated[bool, Flag("Whether it is.")] = False
    style: Annotated[Literal["old", "new"], Flag("Which.")] = "old"
    wait_s: Annotated[float, Flag("How long.", flags.at_least(0))] = 30.0
    room: Room = field(default_factory=Room)
    shelves: tuple[Shelf, ...] = ()

    def __post_init__(self) -> None:
        flags.check(self)


@pytest.mark.parametrize(
    ("allowed", "text", "taken", "refused"),
    [
        (flags.between(1, 1 << 20), "1 to 1048576", [1, 1 << 20], [0, (1 << 20) + 1]),
        (flags.between(0.5, 1e6), "0.5 to 1000000", [0.5, 1e6], [0.4, math.inf, math.nan]),
        (flags.at_least(2), "at least 2", [2, 1 << 70], [1, math.inf, math.nan]),
        (flags.above(0), "a number above 0", [1e-300], [0, -1, math.inf, math.nan]),
        (flags.multiple_of(4, 8, 16), "a multiple of 4 from 8 to 16", [8, 16], [4, 9, 20]),
        (flags.power_of_two(8), "a power of two from 1 to 8", [1, 2, 8], [0, -2, 3, 16]),
        (flags.matching("a|b", "a or b"), "a or b", ["a", "b"], ["", "ab", "a\n"]),
    ],
)
def test_a_bound_takes_what_its_text_says(
    allowed: Allowed, text: str, taken: list[Any], refused: list[Any]
) -> None:
    assert allowed.text == text
    assert [value for value in taken if not allowed.holds(value)] == []
    assert [value for value in refused if allowed.holds(value)] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rooms": 10}, "rooms = 10: 1 to 9"),
        ({"rooms": True}, "rooms = True: a value of type int"),
        ({"rooms": None}, "rooms: a value of type int"),
        ({"rooms": 2.0}, "rooms = 2.0: a value of type int"),
        ({"open": 1}, "open = 1: a value of type bool"),
        ({"style": "odd"}, "style = 'odd': one of old, new"),
        ({"style": ["old"]}, "style = ['old']: one of old, new"),
        ({"wait_s": 10**400}, "wait_s = 1000"),
        ({"room": 5}, "room = 5: a mapping of names to values"),
        ({"room": {1: 2}}, "room = {1: 2}: a mapping of names to values"),
        ({"room": {"size_gb": 0}}, "room.size_gb = 0.0: a number above 0"),
        ({"room": {"size_gb": "5"}}, "room.size_gb = '5': a value of type float"),
        ({"room": {"path": ""}}, "room.path = '': a value of type Path"),
        ({"room": {"path": "a\0"}}, "room.path = 'a\\x00': a path"),
        ({"room": {"syze_gb": 5}}, "room.syze_gb: unknown key; did you mean size_gb?"),
        ({"xyz": 5}, "xyz: unknown key; known: open, room, rooms, shelves, style, wait_s"),
        ({"shelves": {"name": "a"}}, "shelves = {'name': 'a'}: a list"),
        ({"shelves": [{"name": "a"}, 7]}, "shelves[1] = 7: a mapping"),
        ({"shelves": [{"ids": [1]}]}, "shelves[0].name: missing: Its name."),
        ({"shelves": [{"name": "a", "ids": ["1"]}]}, "shelves[0].ids = '1': a value of type int"),
        ({"shelves": [{"name": "A"}]}, "shelves.name = 'A': small letters"),
    ],
)
def test_an_error_names_the_key_the_value_and_what_is_allowed(
    values: flags.Values, message: str
) -> None:
    with pytest.raises(InvalidConfig) as refused:
        flags.build(House, values)
    assert message in str(refused.value)


def test_a_file_is_built_as_its_fields_say() -> None:
    values = {"room": {"size_gb": 5, "path": "~/x"}, "shelves": [{"name": "a", "ids": [1, 2]}]}
    room = Room(5.0, Path.home() / "x")
    assert flags.build(House, values) == House(room=room, shelves=(Shelf("a", (1, 2)),))
    assert flags.build(House, {"room": None}) == House()


def test_a_value_made_in_python_is_checked_as_one_of_a_file_is() -> None:
    for wrong in ({"rooms": 0}, {"style": "odd"}, {"wait_s": math.nan}):
        with pytest.raises(InvalidConfig, match=next(iter(wrong))):
            House(**wrong)  # type: ignore[arg-type]


def house_command(seen: list[flags.Values]) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @flags.takes(House)
    def build(config: Path | None = None, **given: Any) -> None:
        seen.append(flags.nested(House, given))

    return app


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {}),
        ("--open --rooms 3", {"open": True, "rooms": 3}),
        ("--no-open --style new", {"open": False, "style": "new"}),
        ("--config x --room-path /y --wait-s 1", {"room": {"path": Path("/y")}, "wait_s": 1.0}),
    ],
)
def test_options_nest_as_a_file_does(line: str, values: flags.Values) -> None:
    seen: list[flags.Values] = []
    found = CliRunner().invoke(house_command(seen), line.split())
    assert (found.exit_code, seen) == (0, [values])


def test_options_go_over_a_file_whose_section_is_empty() -> None:
    over = {"room": {"size_gb": 2.0}, "rooms": 3}
    assert flags.overlay({"room": None, "rooms": 2, "open": True}, over) == {**over, "open": True}
    kept = flags.overlay({"room": {"path": "/x", "size_gb": 1}}, over)
    assert kept["room"] == {"path": "/x", "size_gb": 2.0}
    with pytest.raises(InvalidConfig, match="room = 5: a mapping"):
        flags.overlay({"room": 5}, over)


def test_help_tells_what_a_field_is_its_default_and_its_bounds() -> None:
    text = " ".join(CliRunner().invoke(house_command([]), ["--help"]).output.split())
    for part in (
        "--rooms <int> How many. [default: 2; allowed: 1 to 9]",
        "--open / --no-open Whether it is. [default: no]",
        "--style <old|new> Which. [default: old]",
        "--wait-s <float> How long. [default: 30; allowed: at least 0]",
        "--room-size-gb <float> How big. [default: any; allowed: a number above 0]",
        "--room-path <path> Where. [default: nowhere]",
    ):
        assert part in text
    assert "shelves" not in text
    assert flags.example("x", House) == "Example: x --room-size-gb 5 --room-path /x"


@pytest.mark.parametrize("config", [ServeConfig, TenantConfig, EngineConfig])
def test_every_flag_has_a_sentence_and_a_default_in_words(config: type) -> None:
    for each in flags.options_of(config):
        assert each.flag.help.endswith("."), each.name
        if config is not TenantConfig:  # a tenant's are in the file alone
            assert each.field.default is not None or each.flag.shown, each.name


def test_the_example_of_the_daemon_is_one_that_it_takes() -> None:
    words = flags.example("kvc2 serve", ServeConfig).removeprefix("Example: kvc2 ").split()
    missing = "/nowhere/none.yaml"  # the only thing that is wrong
    found = CliRunner().invoke(cli.app, [*words, "--config", missing])
    assert found.exit_code == 2
    assert found.output.startswith(f"kvc2: config = '{missing}': a readable file")


SECRETS = [
    *("key: 'secret", "secret: {", "a: b: secret", "\0secret", "- secret", "secret: [\x07]"),
    *("a: *secret", "a: !secret b", "a: &secret b\nb: &secret c"),
    *("{a: b: secret", "? secret\n- b", "@secret", "secret: b\n c: d\n  secret"),
]


@pytest.mark.parametrize("text", SECRETS)
def test_no_error_quotes_a_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InvalidConfig) as refused:
        flags.read("api_keys", file)
    assert refused.value.field == "api_keys"
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("module", ["kvc2.commands.cli", "engine.cli"])
def test_help_waits_for_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "fastapi", "grpc", "numpy"} & set(run.stdout.split())

"""The command line: flags are the configuration's fields, mistakes are exit code 2."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvc2 import config
from kvc2.commands import cli
from tests.doubles.daemons import ServedDaemon, serve_config

run = CliRunner().invoke


def test_every_key_of_the_file_but_tenants_is_a_flag() -> None:
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    found = {each.name: each.opts for each in command.params if each.name != "config"}
    names = set()
    for each in dataclasses.fields(config.ServeConfig):
        inner = getattr(config.ServeConfig(), each.name)
        names |= (
            {f"{each.name}_{part.name}" for part in dataclasses.fields(inner)}
            if dataclasses.is_dataclass(inner)
            else {each.name}
        )
    assert names - {"tenants"} == set(found) - {"help"}
    assert all(opts == ["--" + name.replace("_", "-")] for name, opts in found.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--listen", "0.0.0.0:1"], "a public one needs TLS"),
        (["serve", "--cpu-memory-size-gb", "-3"], "cpu.memory_size_gb = -3"),
        (["serve", "--config", "/does/not/exist"], "config"),
        (["serve", "--disk-size-gb", "5"], "disk.size_gb"),
        (["serve", "--nonsense"], "nonsense"),
        (["evict", "--tier", "tape"], "tape"),
        (["flush", "--deadline-s", "-1"], "deadline"),
        (["stats", "--address", "nowhere"], "address"),
    ],
)
def test_bad_usage_is_exit_code_2_and_named(arguments: list[str], words: str) -> None:
    found = run(cli.app, arguments)
    assert found.exit_code == 2
    assert words in found.output


def test_no_daemon_is_exit_code_1(tmp_path: Path) -> None:
    found = run(cli.app, ["stats", "--address", f"unix:{tmp_path / 'none'}"])
    assert found.exit_code == 1
    assert "no such socket" in found.output


def test_commands_print_json(tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path)) as served:
        at = ["--address", served.address, "--json"]
        assert json.loads(run(cli.app, ["stats", *at]).stdout)["sessions"] == []
        assert json.loads(run(cli.app, ["flush", *at]).stdout)["durable_blocks"] == 0
        evicted = run(cli.app, ["evict", "--tier", "gpu", *at])
        assert json.loads(evicted.stdout) == {"evicted_blocks": 0, "last_copies": 0}


@pytest.mark.parametrize(
    "command", ["serve", "stats", "flush", "evict", "invalidate", "explain", "drain"]
)
def test_help_has_an_example(command: str) -> None:
    found = run(cli.app, [command, "--help"])
    assert found.exit_code == 0
    assert f"Example: kvc2 {command}" in found.output

"""The command line: flags are the configuration's fields, mistakes are exit code 2."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvc2 import cli, config, config_file, serve_command
from tests.daemons import ServedDaemon, serve_config

run = CliRunner().invoke


def test_every_field_is_a_flag_and_every_flag_a_field() -> None:
    fields = set()
    for field in dataclasses.fields(config.ServeConfig):
        kind = config_file.SECTIONS.get(field.name)
        names = [each.name for each in dataclasses.fields(kind)] if kind else [None]
        fields |= {f"{field.name}_{name}" if name else field.name for name in names}
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    flags = {each.name for each in command.params} - {"config_file", "help"}
    assert flags == fields - {"tenants"}
    for name in flags - {"gpu_only"}:
        option = next(each for each in command.params if each.name == name)
        assert option.opts == ["--" + name.replace("_", "-")]


def test_flags_nest_as_the_file_does() -> None:
    flags = {"cpu_memory_size_gb": 5.0, "disk_path": Path("/x"), "drain_timeout_s": 1.0}
    flags["write_policy"] = serve_command.WritePolicy.back
    assert serve_command.nested(flags) == {
        "cpu": {"memory_size_gb": 5.0},
        "disk": {"path": Path("/x")},
        "drain_timeout_s": 1.0,
        "write_policy": "back",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--listen", "0.0.0.0:1"], "mTLS"),
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

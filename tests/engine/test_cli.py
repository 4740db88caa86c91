"""Settings from a file and flags, checked once; text as it comes; the command's exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine import _kernels, demo_model, spellings
from engine.cli import app
from engine.http.keys import file_keys
from engine.settings import THREADS_MAX, EngineConfig, load
from engine.text import IncrementalText
from kvc2.client import Admin
from kvc2.errors import InvalidConfig, InvalidRequest
from kvc2.host import machine
from kvc2.host.address import Address
from tests.doubles.engines import TinyEngine

KTRANSFORMERS = """
log: {dir: logs, level: DEBUG}
server: {ip: 0.0.0.0, port: 10002}
user: {secret_key: x}
model: {type: balance_serve}
attn:
  page_size: 256
  chunk_size: 512
kvc2:
  gpu_only: true
  utilization_percentage: 1.0
  cpu_memory_size_GB: 500
"""


def test_a_ktransformers_file_loads_unchanged(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(KTRANSFORMERS)
    config = load(tmp_path / "config.yaml", {"model": Path("m")})
    assert (config.page_size, config.chunk_size, config.port) == (256, 512, 30000)


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: /m\nmax_running: 3\nport: 1\nkvc2: unix:/x\n")
    config = load(tmp_path / "c.yaml", {"port": 2})
    assert (config.max_running, config.port, config.kvc2) == (3, 2, "unix:/x")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"page_size": 24}, "page_size"),
        ({"chunk_size": 40}, "chunk_size"),
        ({"max_running": 0}, "max_running"),
        ({"cuda_graph_sizes": "1,9999"}, "cuda_graph_sizes"),
        ({"max_queued": 0}, "max_queued"),
        ({"threads": -1}, "threads"),
        ({"threads": 1025}, "threads"),
        ({"device_threads": 1025}, "device_threads"),
        ({"cpu_isa": "sse2"}, "cpu_isa"),
        ({"num_pages": 1}, "num_pages"),
        ({"port": 65536}, "port"),
        ({"kv_memory_gb": 0.0}, "kv_memory_gb"),
        ({"max_body_mb": float("inf")}, "max_body_mb"),
        ({"load_timeout_s": -1.0}, "load_timeout_s"),
        ({"token_budget": 256}, "token_budget"),
        ({"mixed_chunk_size": 0}, "mixed_chunk_size"),
        ({"host": "0.0.0.0"}, "host"),
        ({"num_gpu_experts": -1}, "num_gpu_experts"),
        ({"gpu_experts_ratio": 1.5}, "gpu_experts_ratio"),
        ({"gpu_experts_ratio": 0.5, "num_gpu_experts": 1}, "gpu_experts_ratio"),
        ({"expert_placement_strategy": "frequency"}, "expert_placement_strategy"),
        ({"expert_placement_strategy": "best"}, "expert_placement_strategy"),
        ({"enable_dynamic_expert_update": True}, "enable_dynamic_expert_update"),
        ({"init_expert_location": Path("a.txt")}, "init_expert_location"),
        ({"expert_statistics": Path("a.pt")}, "expert_statistics"),
    ],
)
def test_a_bad_setting_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        EngineConfig(model=Path("m"), **fields)
    assert refused.value.field == named


def test_threads_are_as_many_as_this_process_may_use_and_the_kernels_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EngineConfig(model=Path("m"), threads=3).cpu_threads == 3
    monkeypatch.setattr(machine, "cpus", lambda: 5)
    assert EngineConfig(model=Path("m")).cpu_threads == 5
    monkeypatch.setattr(machine, "cpus", lambda: 5000)
    assert EngineConfig(model=Path("m")).cpu_threads == THREADS_MAX
    with pytest.raises(ValueError, match=f"1 to {THREADS_MAX}"):
        _kernels.Workbench("portable", THREADS_MAX + 1)


NO_ADDRESSES = ["/run/kvc2.sock", "unix:", "host", "host:", ":5", "host:http", "host:0", "h:65536"]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_what_is_no_address_of_a_daemon_is_told_at_once(address: str) -> None:
    with pytest.raises(InvalidConfig, match=r"kvc2 = .*unix:PATH or HOST:PORT") as refused:
        EngineConfig(model=Path("m"), kvc2=address)
    assert (refused.value.field, refused.value.value) == ("kvc2", address)
    for ask in (Address.of_daemon, Admin, TinyEngine):  # the last one is a whole client
        with pytest.raises(InvalidRequest, match="address"):
            ask(address)


@pytest.mark.parametrize("address", ["unix:/x", "unix:x", "localhost:5", "127.0.0.1:1", "[::1]:9"])
def test_an_address_is_one_to_the_engine_and_to_the_client(address: str) -> None:
    assert EngineConfig(model=Path("m"), kvc2=address).kvc2 == address
    assert str(Address.of_daemon(address).path or "TCP") in ("/x", str(Path("x").absolute()), "TCP")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_runing: 3", "max_runing: unknown key; did you mean max_running"),
        ("attn: {page_size: many}", "attn.page_size = 'many'"),
        ("attn: {page_sise: 16}", "attn.page_sise: unknown key; did you mean page_size"),
        ("attn: 5", "attn"),
        ("port: many", "port"),
        ("- a", "config"),
        ("a: [", "config"),
    ],
)
def test_a_bad_file_is_told_with_the_nearest_name(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InvalidConfig, match=named):
        load(tmp_path / "c.yaml", {"model": Path("m")})


KT_FLAGS = [
    *("--kt-num-gpu-experts", "8", "--kt-expert-placement-strategy=random"),
    *("--kt-enable-dynamic-expert-update", "--kt-cpuinfer", "2", "--model", "--kt-x"),
]


def test_ktransformers_flags_are_ours_in_another_spelling(tmp_path: Path) -> None:
    assert spellings.arguments(KT_FLAGS) == [
        *("--num-gpu-experts", "8", "--expert-placement-strategy=random"),
        *("--enable-dynamic-expert-update", "--threads", "2", "--model", "--kt-x"),
    ]
    (tmp_path / "c.yaml").write_text("kt_num_gpu_experts: 8\nkt_cpuinfer: 2\nmodel: /m\n")
    config = load(tmp_path / "c.yaml", {})
    assert (config.num_gpu_experts, config.threads) == (8, 2)
    for name in spellings.OURS.values():
        assert name in EngineConfig.__dataclass_fields__


@pytest.mark.parametrize("key", spellings.REFUSED)
def test_a_spelling_without_a_flag_is_refused_with_what_to_use(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidConfig, match=f"{key}.*(leave it out|use --)"):
        spellings.arguments([f"--{key.replace('_', '-')}", "1"])
    (tmp_path / "c.yaml").write_text(f"{key}: 1\n")
    with pytest.raises(InvalidConfig, match=f"{key}.*(leave it out|use --)"):
        load(tmp_path / "c.yaml", {"model": Path("m")})


def test_a_setting_in_two_spellings_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"kt_cpuinfer.*threads, which is there too"):
        spellings.keys({"threads": 1, "kt_cpuinfer": 2})


def test_keys_are_read_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("secret-a: team-a\nsecret-b: team-b\n")
    keys = file_keys(path)
    assert [keys.owner(f"secret-{each}") for each in "abc"] == ["team-a", "team-b", None]
    path.write_text("secret-a: 5\n")
    with pytest.raises(InvalidConfig) as refused:
        file_keys(path)
    assert "secret" not in str(refused.value)


def test_help_names_every_setting_and_an_example() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"]).output
    assert "Example: kvc2-engine serve --model ~/models/mixtral --kvc2" in text
    for name in EngineConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert CliRunner().invoke(app, ["serve", "--no-such-flag"]).exit_code == 2


@pytest.mark.parametrize("named", [True, False])
def test_the_demo_model_has_a_place_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool
) -> None:
    built: list[Path] = []

    def build(directory: Path, **_: Any) -> Path:
        built.append(directory)
        return directory

    monkeypatch.setattr(demo_model, "build", build)
    monkeypatch.setattr(demo_model, "default_directory", lambda: tmp_path / "default")
    wanted = tmp_path / ("named" if named else "default")
    result = CliRunner().invoke(app, ["make-demo-model", *([str(wanted)] if named else [])])
    assert (result.exit_code, built) == (0, [wanted])
    assert str(wanted) in result.output


def decode_utf8(token_ids: Any) -> str:
    return bytes(token_ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["plain", "Grüße 🎉 ok", "日本語", "\ud7ff end"])
def test_characters_come_whole_and_once(text: str) -> None:
    stream = IncrementalText(decode_utf8)
    pieces = [stream.push(byte).text for byte in text.encode()]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_in_the_end() -> None:
    stream = IncrementalText(decode_utf8)
    text = "".join(stream.push(byte).text for byte in b"a\xffb\xe4") + stream.flush()
    assert text == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("ends with sto", ["stop"], "ends with sto"),
    ],
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str], shown: str) -> None:
    stream = IncrementalText(decode_utf8, stop)
    out = ""
    for byte in text.encode():
        piece = stream.push(byte)
        out += piece.text
        if piece.stop is not None:
            assert piece.stop in stop
            assert text.startswith(shown + piece.stop)
            break
    else:
        out += stream.flush()
    assert out == shown

"""Addresses and paths as users write them: each is reached, or refused by name at the start."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from engine.http.keys import file_keys
from engine.settings import EngineConfig
from engine.settings import load as load_engine
from kvc2 import config, flags
from kvc2.commands import config_file, prompts
from kvc2.commands.cli import app
from kvc2.config import ServeConfig, TenantConfig
from kvc2.errors import InvalidConfig, InvalidRequest, StartRefused
from kvc2.host.address import Address
from kvc2.host.paths import user_path
from kvc2.server.claim import Claim
from kvc2.server.tenants import Tenants
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import TinyEngine, identity
from tests.system.daemon import DaemonProcess

# names of a folder and of a file: whatever a file system takes (but see REFUSED)
ODD = [
    *("a b", " a ", "a#b", "#", "a?b", "?a=b", "a%b", "%", "a%20b", "a%23b", "%00", "ünï", "日本"),
    *("a\nb", "a\\b", "a&b=c;d", "a@b", "a:b", "unix:", "[x]", "a+b", "'\"", "$HOME", "a~", "-x"),
    *("{a}", "*", "...", "a..b"),
]


def private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True)
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of this user, and the folder that the test is in is another one."""
    folder, here = private(tmp_path / "home"), private(tmp_path / "here")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(here)
    return folder


@pytest.mark.parametrize("name", ODD)
def test_a_daemon_is_reached_at_every_path(name: str, tmp_path: Path) -> None:
    """By the command line, the engine's client and the side socket."""
    folder = tmp_path / name
    served_config = serve_config(tmp_path, disk=True, listen=f"unix:{folder / name}")
    with ServedDaemon(served_config, cache=None) as served:
        found = {each.name: mode(each) for each in folder.iterdir()}
        assert found == {name: 0o600, f"{name}.side": 0o600, f"{name}.lock": 0o600}
        assert stat.S_ISSOCK((folder / name).lstat().st_mode)
        assert mode(folder) == 0o700
        with TinyEngine(served.address) as engine:
            handle = engine.client.open_namespace(identity().encode())
            assert engine.client.match(handle, np.arange(40, dtype=np.uint32)).matched_tokens == 0
            told = CliRunner().invoke(app, ["stats", "--address", served.address, "--json"])
            assert told.exit_code == 0, told.output
            assert len(json.loads(told.stdout)["sessions"]) == 1
        with pytest.raises(StartRefused, match="another daemon"):
            Claim(served.address)
    assert sorted(os.listdir(folder)) == [f"{name}.lock"]
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted({name, "disk"})


@pytest.mark.parametrize("name", ["a #?%", "%41", "~"])
def test_the_commands_take_every_path(name: str, tmp_path: Path) -> None:
    """A daemon as a process, its disk, a prompt's file and the offline check below such a name."""
    folder = private(tmp_path / name)
    disk = folder / name
    with DaemonProcess(folder, "--disk-path", str(disk), "--disk-size-gb", "0.1") as daemon:
        tokens = folder / f"{name}.json"
        tokens.write_text(json.dumps(list(range(64))))
        with TinyEngine(daemon.address) as engine:
            engine.client.open_namespace(identity().encode())
            for command in ("explain", "pin", "prefetch"):
                flags = [command, "--tokens", str(tokens), "--address", daemon.address]
                told = CliRunner().invoke(app, flags)
                assert told.exit_code == 0, told.output
        assert daemon.stop() == 0
    assert (disk / "catalogue").is_dir()
    assert CliRunner().invoke(app, ["check", str(disk)]).exit_code == 0


FORMS = [
    ("unix:/a/b.sock", "/a/b.sock", "unix:/a/b.sock"),
    ("unix:///a/b.sock", "/a/b.sock", "unix:/a/b.sock"),
    ("unix:////a//b.sock", "/a/b.sock", "unix:/a/b.sock"),
    ("unix:b.sock", "HERE/b.sock", "unix:HERE/b.sock"),
    ("unix:./b.sock", "HERE/b.sock", "unix:HERE/b.sock"),
    ("unix:~/b.sock", "HOME/b.sock", "unix:HOME/b.sock"),
    ("unix:./~/b.sock", "HERE/~/b.sock", "unix:HERE/~/b.sock"),
    ("unix:/a/~", "/a/~", "unix:/a/~"),
    ("unix:/a?x=1#y", "/a?x=1#y", "unix:/a%3Fx%3D1%23y"),
    ("unix:/a%20b", "/a%20b", "unix:/a%2520b"),
    ("unix:/ü", "/ü", "unix:/%C3%BC"),
    ("localhost:5", None, "localhost:5"),
    ("127.0.0.1:65535", None, "127.0.0.1:65535"),
    ("[::1]:9", None, "[::1]:9"),
]


@pytest.mark.parametrize(("text", "path", "target"), FORMS)
def test_an_address_is_one_path_or_port(
    text: str, path: str | None, target: str, home: Path
) -> None:
    places = {"HERE": str(Path.cwd()), "HOME": str(home)}
    for name, place in places.items():
        path, target = path and path.replace(name, place), target.replace(name, place)
    found = Address.of_daemon(text)
    assert (found.path and str(found.path), found.grpc_target.replace("%7E", "~")) == (path, target)
    assert config.listen_address(text) == found
    assert EngineConfig(model=Path("m"), kvc2=text).kvc2 == text


# what no daemon can listen at, and a word of the answer
REFUSED = [
    ("unix:", "unix:PATH"),
    ("unix:/", "folder"),
    ("unix:.", "folder"),
    ("unix:..", "folder"),
    ("unix:~", "folder"),
    ("unix:folder", "folder"),
    ("unix:/nowhere/", "folder"),
    ("unix:/nowhere/.", "folder"),
    ("unix://host/x", "two slashes"),
    ("unix://x", "two slashes"),
    ("unix:@x", "abstract"),
    ("unix-abstract:x", "abstract"),
    ("unix:/a\0b", "unix:PATH"),
    ("unix:\0x", "unix:PATH"),
    ("unix:/a,b", "comma"),
    ("unix:/a\udcffb", "UTF-8"),
    ("unix:~nobody-has-this-name/x", "names no home here"),
    ("unix:/" + "x" * 107, "107 bytes: from the root it has 108"),
    ("unix:/" + "ü" * 60, "107 bytes: from the root it has 121"),
    ("/run/kvc2.sock", "did you mean unix:/run/kvc2.sock"),
    ("~/kvc2.sock", "did you mean unix:~/kvc2.sock"),
    ("", "unix:PATH or HOST:PORT"),
    ("::1:5", "[IPv6]:PORT"),
    ("[localhost]:5", "[IPv6]:PORT"),
    ("http://localhost:5", "HOST:PORT"),
    ("dns:///localhost:5", "HOST:PORT"),
    ("a b:5", "HOST:PORT"),
    ("localhost:65536", "port 1 to 65535"),
    ("localhost:-1", "HOST:PORT"),
    ("localhost:٥", "HOST:PORT"),
]


@pytest.mark.parametrize(("text", "word"), REFUSED)
def test_what_can_never_work_is_refused_by_name_for_each_option(
    text: str, word: str, home: Path
) -> None:
    (Path.cwd() / "folder").mkdir()
    with pytest.raises(InvalidConfig) as at_serve:
        ServeConfig(listen=text)
    with pytest.raises(InvalidConfig) as at_engine:
        EngineConfig(model=Path("m"), kvc2=text)
    with pytest.raises(InvalidRequest) as at_client:
        TinyEngine(text)
    fields = [each.value.field for each in (at_serve, at_engine, at_client)]
    assert fields == ["listen", "kvc2", "address"]
    assert {each.value.value for each in (at_serve, at_engine, at_client)} == {text}
    assert word.replace("107", "102") in at_serve.value.allowed  # room for the side socket
    assert word in at_engine.value.allowed
    assert word in at_client.value.allowed
    if text and "\0" not in text:  # an empty one is the default
        told = CliRunner().invoke(app, ["stats", "--address", text])
        assert told.exit_code == 2
    assert os.listdir(home) == []  # nothing was made
    assert os.listdir() == ["folder"]


def test_a_daemon_leaves_room_for_its_side_socket(tmp_path: Path) -> None:
    longest = "unix:/" + "x" * 101
    assert config.listen_address(longest).path is not None
    with pytest.raises(InvalidConfig, match="1 to 102 bytes: from the root it has 103"):
        ServeConfig(listen=longest + "x")
    assert Address.of_daemon(longest + "x" * 5)  # by a link, a longer one may lead there


def test_the_longest_path_is_served(tmp_path: Path) -> None:
    folder = private(tmp_path / "f")
    name = "s" * (102 - len(os.fsencode(folder)) - 1)
    served_config = serve_config(tmp_path, listen=f"unix:{folder / name}")
    with ServedDaemon(served_config) as served, TinyEngine(served.address) as engine:
        assert engine.client.state == "attached"


def test_a_home_is_not_a_folder_of_that_name(home: Path) -> None:
    served_config = serve_config(home, listen="unix:~/run/kvc2.sock")
    with ServedDaemon(served_config) as served, TinyEngine(served.address):
        assert (home / "run/kvc2.sock").is_socket()
    assert os.listdir() == []


def test_a_runtime_folder_that_is_not_absolute_is_ignored(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert config.default_listen() == f"unix:/tmp/kvc2-{os.getuid()}/kvc2.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/{'x' * 100}")
    with pytest.raises(InvalidConfig, match="listen"):
        Claim("localhost:0")


FILES = [*ODD, "~", "~nobody-has-this-name"]


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_name_are_read(name: str, home: Path) -> None:
    """Those of each option, named from the root, where nothing but itself can be meant."""
    folder = private(Path.cwd() / name)
    file = folder / name
    file.write_text("disk: {size_gb: 0.1, path: DISK}\n".replace("DISK", json.dumps(str(folder))))
    assert config_file.load(file, {}).disk.path == folder
    file.write_text("key: tenant\n")
    assert file_keys(file).owner("key") == "tenant"
    file.write_text(json.dumps({"model": str(folder), "api_keys": str(file)}))
    found = load_engine(file, {})
    assert (found.model, found.api_keys) == (folder, file)
    assert found.model_name == name
    file.write_text("1 2 3")
    assert prompts.read_tokens(file).tokens.tolist() == [1, 2, 3]
    file.write_text("x" * 16)
    file.chmod(0o600)
    assert Tenants(ServeConfig(tenants=(TenantConfig("t", file),))).namespace(
        "t", 0, identity().encode(), b""
    )


def test_a_tilde_is_a_home_for_every_option(home: Path) -> None:
    (home / "c.yaml").write_text(
        "disk: {size_gb: 0.1, path: ~/d}\ntenants: [{name: a, secret_file: ~/s}]\n"
    )
    found = config_file.load(Path("~/c.yaml"), {})
    assert (found.disk.path, found.tenants[0].secret_file) == (home / "d", home / "s")
    (home / "e.yaml").write_text("model: ~/m\napi_keys: ~/k\n")
    engine = load_engine(Path("~/e.yaml"), {})
    assert (engine.model, engine.api_keys) == (home / "m", home / "k")
    assert engine.model_name == "m"
    (home / "p").write_text("1 2")
    assert prompts.read_tokens(Path("~/p")).tokens.tolist() == [1, 2]
    for command in (["check", "~/d"], ["replay", "~/t.jsonl"]):
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 2
        assert str(home) in told.output
    assert os.listdir() == []


BAD_PATHS: list[tuple[Any, str]] = [
    ({"disk": {"path": "a\0b", "size_gb": 1}}, "disk.path"),
    ({"disk": {"path": "~nobody-has-this-name/x", "size_gb": 1}}, "disk.path"),
    ({"tenants": [{"name": "a", "secret_file": "\0"}]}, "tenants.secret_file"),
]


@pytest.mark.parametrize(("values", "field"), BAD_PATHS)
def test_what_is_no_path_is_refused_by_name(values: Any, field: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        flags.build(ServeConfig, values)
    assert refused.value.field == field


@pytest.mark.parametrize("field", ["model", "api_keys"])
def test_what_is_no_path_is_refused_by_the_engine(field: str) -> None:
    for text in ("a\0b", "~nobody-has-this-name/x"):
        with pytest.raises(InvalidConfig) as refused:
            EngineConfig(**{"model": Path("m"), field: Path(text)})
        assert refused.value.field == field


def test_no_path_at_all_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="model"):
        user_path("model", "")

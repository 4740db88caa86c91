"""The daemon around its calls: limits, who is told what, health, metrics, restarts, faults."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvc2.client import Admin
from kvc2.client.channel import Channel
from kvc2.config import DiskConfig, TenantConfig
from kvc2.errors import Denied, InvalidConfig, StartRefused
from kvc2.host.address import Address
from kvc2.server.claim import Claim
from kvc2.server.tenants import Tenants
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import identity
from tests.doubles.wires import Wire
from tests.kvc2.server.test_server import acquire

IDENTITY = identity().encode()


def test_a_fault_of_the_daemons_own_is_counted_and_tells_nothing(tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path)) as served, Wire(served.address) as wire:
        wire.open()
        served.daemon.cache.fail = RuntimeError("a secret path")  # type: ignore[attr-defined]
        status, words = wire.refusal("Acquire", acquire(wire))
        assert status == "INTERNAL"
        assert "secret" not in words
        with Admin(served.address) as admin:
            assert admin.stats().counters["faults_total{kind=internal_error}"] == 1


def test_health_reflection_and_metrics_are_served(tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path, metrics_port=0)) as served:
        channel = Channel(Address.of_daemon(served.address))
        assert channel.serves(5)
        channel.close()
        stub = reflection_pb2_grpc.ServerReflectionStub(grpc.insecure_channel(served.address))
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(stub.ServerReflectionInfo(iter([request]))))
        names = {each.name for each in answer.list_services_response.service}
        assert {"kvc2.v1.Cache", "kvc2.v1.Sessions", "grpc.health.v1.Health"} <= names
        with Wire(served.address) as wire:
            wire.open()
            url = f"http://127.0.0.1:{served.daemon.metrics_port}/metrics"
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        assert 'kvc2_pages{state="private",tier="gpu"} 8.0' in text
        assert 'kvc2_faults_total{kind="corrupt_block"} 0.0' in text


def test_a_port_is_told_only_of_tcp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    caplog.set_level("INFO")
    told = []
    for listen in (f"unix:{tmp_path / 'kvc2.sock'}", "127.0.0.1:0"):
        with ServedDaemon(serve_config(tmp_path, listen=listen)) as served:
            record = [each for each in caplog.records if each.message == "serving"][-1]
            told.append((record.__dict__["facts"].get("port"), served.daemon.port))
    assert told[0][0] is None
    assert told[1][0] == told[1][1] > 0


def test_it_listens_on_loopback_tcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with ServedDaemon(serve_config(tmp_path, listen="127.0.0.1:0")) as served:
        address = f"127.0.0.1:{served.daemon.port}"
        with Wire(address) as wire:
            wire.open()
            wire.call("Acquire", acquire(wire))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "other"))
        with (
            pytest.raises(InvalidConfig, match=f"^listen = '{address}': a port that nobody has"),
            ServedDaemon(serve_config(tmp_path / "x", listen=address)),
        ):
            pass


def test_the_sockets_are_the_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with ServedDaemon(serve_config(folder)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for name in ("kvc2.sock", "kvc2.sock.side", "kvc2.sock.lock"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    assert sorted(path.name for path in folder.iterdir()) == ["kvc2.sock.lock"]


def test_one_daemon_a_socket_and_a_dead_ones_socket_is_taken_over(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 'kvc2.sock'}"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "kvc2.sock"))
    dead.close()
    first = Claim(listen)
    with pytest.raises(StartRefused, match="another daemon"):
        Claim(listen)
    first.close()
    (tmp_path / "kvc2.sock").write_text("someone's file")
    with pytest.raises(StartRefused, match="not a socket"):
        Claim(listen)


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StartRefused, match="writable by others"):
        Claim(f"unix:{tmp_path / 'kvc2.sock'}")


def test_the_default_tenants_secret_is_made_once_and_kept_private(tmp_path: Path) -> None:
    config = serve_config(tmp_path, disk=True)
    assert config.disk.path is not None
    first = Tenants(config).namespace("", os.getuid(), IDENTITY, b"")
    file = config.disk.path / "default-tenant.secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secret = file.read_bytes()
    assert Tenants(config).namespace("default", os.getuid(), IDENTITY, b"") == first
    assert file.read_bytes() == secret
    file.chmod(0o644)
    with pytest.raises(InvalidConfig, match="0600"):
        Tenants(config)
    file.chmod(0o600)
    file.write_bytes(b"short")
    with pytest.raises(InvalidConfig, match="at least 16 bytes"):
        Tenants(config)


def test_a_tenant_is_open_to_its_user_ids_alone(tmp_path: Path) -> None:
    secret = tmp_path / "a.secret"
    secret.write_bytes(b"s" * 32)
    secret.chmod(0o600)
    tenant = TenantConfig("a", secret, uids=(12345,))
    config = serve_config(tmp_path, tenants=(tenant,), disk=False)
    assert config.disk == DiskConfig()
    tenants = Tenants(config)
    named = tenants.namespace("a", 12345, IDENTITY, b"")
    assert named != tenants.namespace("", os.getuid(), IDENTITY, b"")
    with pytest.raises(Denied, match="not open to user id 1"):
        tenants.namespace("a", 1, IDENTITY, b"")


def test_serving_needs_neither_torch_nor_the_engine() -> None:
    code = "import sys, kvc2.commands.cli, kvc2.server; print({'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_frozen_engine_is_fenced_on_the_daemons_clock(tmp_path: Path) -> None:
    now = [1000.0]
    config = serve_config(tmp_path)
    with ServedDaemon(config, clock=lambda: now[0]) as served, Wire(served.address) as wire:
        wire.open()
        now[0] += 3.0
        served.on_loop(served.daemon.attachments.expire)
        assert wire.refusal("Acquire", acquire(wire))[0] == "FAILED_PRECONDITION"
        with pytest.raises(grpc.RpcError, match=re.escape("no heartbeat for 3 s")):
            next(wire.stream)

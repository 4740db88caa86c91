"""TLS of the daemon's port, with processes and certificates as they are: who gets in, who doesn't.

Not here: what a certificate's name may do (tests/kvc2/server/test_credentials.py).
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import free_port
from kvc2.client import Admin, open_objects
from kvc2.client.channel import Channel
from kvc2.errors import InvalidRequest, Unreachable
from kvc2.foreign_identity import Foreign
from kvc2.host.address import Address
from kvc2.host.tls import TlsFiles
from tests.doubles.certificates import HOSTS, CertificateAuthority, replace
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess

OURS, OTHERS = CertificateAuthority("ours"), CertificateAuthority("others")
OPERATOR = "operator"
IDENTITY = Foreign("test", "w", {"page_size": 1}).encode()


class TlsDaemon(DaemonProcess):
    """Listens on TCP with the files of folder/tls; `operator` reaches it."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.files = OURS.pair("daemon", HOSTS).files(folder / "tls", OURS)
        self.port = free_port()
        own = self.files
        paths = (own.certificate, own.key, own.ca)
        names = ("--tls-certificate", "--tls-key", "--tls-client-ca")
        flags = [text for pair in zip(names, map(str, paths), strict=True) for text in pair]
        flags += ["--tls-administrators", "somebody", "--tls-administrators", OPERATOR]
        super().__init__(
            folder,
            *("--listen", f"{host}:{self.port}", *flags),
            environment={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        )
        self.operator = OURS.pair(OPERATOR).files(folder / "operator", OURS)

    def at(self, tls: TlsFiles | None, host: str = "127.0.0.1") -> Address:
        return Address.of_daemon(f"{host}:{self.port}", tls=tls)

    def reason(self, tls: TlsFiles | None, host: str = "127.0.0.1") -> str:
        """Why this caller can't reach it; empty: it can."""
        channel = Channel(self.at(tls, host))
        try:
            why = channel.absence(10.0)
        finally:
            channel.close()
        return "" if why is None else str(why)

    def serves(self) -> bool:
        return not self.reason(self.operator)

    def admin(self) -> Admin:
        return Admin(self.at(self.operator))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsDaemon]:
    with TlsDaemon(tmp_path_factory.mktemp("tls")) as daemon:
        yield daemon


def test_who_has_a_certificate_of_the_ca_gets_in(daemon: TlsDaemon) -> None:
    assert daemon.admin().stats().instance
    assert daemon.reason(daemon.operator, "localhost") == ""


def test_a_certificate_of_another_ca_does_not(daemon: TlsDaemon, tmp_path: Path) -> None:
    caller = OTHERS.pair(OPERATOR).files(tmp_path / "caller", OURS)
    assert "doesn't believe" in daemon.reason(caller)


def test_an_expired_certificate_does_not(daemon: TlsDaemon, tmp_path: Path) -> None:
    caller = OURS.pair(OPERATOR, days=-1).files(tmp_path / "caller", OURS)
    assert "doesn't believe" in daemon.reason(caller)


def test_a_caller_without_a_certificate_does_not(daemon: TlsDaemon) -> None:
    context = ssl.create_default_context(cafile=str(daemon.operator.ca))
    with socket.create_connection(("127.0.0.1", daemon.port), 10) as plain:
        plain.settimeout(10)
        # TLS 1.3 tells a client that it lacks a certificate after its own end of the handshake
        with pytest.raises(OSError), context.wrap_socket(plain, server_hostname="localhost") as end:  # noqa: PT012
            end.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            while end.recv(1):
                pass
            raise ConnectionAbortedError("it was ended")


def test_a_caller_in_clear_does_not(daemon: TlsDaemon) -> None:
    with pytest.raises(Unreachable), Admin(str(daemon.at(None))) as admin:
        admin.stats()
    assert daemon.reason(None)
    assert daemon.admin().stats().instance


def test_a_daemon_of_another_ca_is_not_believed(daemon: TlsDaemon, tmp_path: Path) -> None:
    caller = OURS.pair(OPERATOR).files(tmp_path / "caller", OTHERS)
    assert "CERTIFICATE_VERIFY_FAILED" in daemon.reason(caller)


def test_a_daemon_of_another_host_s_name_is_not_believed(tmp_path: Path) -> None:
    with TlsDaemon(tmp_path) as daemon:
        OURS.pair("daemon", ["127.0.0.1"]).files(tmp_path / "tls", OURS)
        assert daemon.reason(daemon.operator, "127.0.0.1") == ""
        assert "no connection with TLS" in daemon.reason(daemon.operator, "localhost")


def test_changed_files_count_from_the_next_connection_on(tmp_path: Path) -> None:
    with TlsDaemon(tmp_path) as daemon:
        stop, failed, calls = threading.Event(), [], []

        def call_on() -> None:
            with daemon.admin() as admin:
                while not stop.is_set():
                    try:
                        calls.append(admin.stats().uptime_s)
                    except Exception as error:
                        failed.append(error)
                    stop.wait(0.01)

        caller = threading.Thread(target=call_on)
        caller.start()
        try:
            theirs = OTHERS.pair(OPERATOR).files(tmp_path / "theirs", OTHERS)
            assert daemon.reason(theirs)
            wait_until(lambda: calls or failed)  # it is connected before anything changes

            expired = OURS.pair("daemon", HOSTS, days=-1).files(tmp_path / "tls", OURS)
            assert "expired" in daemon.reason(daemon.operator)

            fresh = OTHERS.pair("daemon", HOSTS)
            replace(expired.certificate, fresh.certificate)  # its key is not there yet
            replace(expired.ca, OTHERS.certificate)
            assert "expired" in daemon.reason(daemon.operator)
            wait_until(lambda: "tls_files_refused" in daemon.tail())

            replace(expired.key, fresh.key)
            assert daemon.reason(theirs) == ""
            assert daemon.reason(daemon.operator)
            before = len(calls)
            assert daemon.reason(theirs) == ""
            while len(calls) < before + 2 and not failed:
                stop.wait(0.01)
        finally:
            stop.set()
            caller.join()
        assert not failed
        with Admin(daemon.at(theirs)) as admin:
            assert admin.stats().counters["faults_total{kind=tls_files_refused}"] >= 1


def test_an_address_of_all_interfaces_needs_tls_and_has_it(tmp_path: Path) -> None:
    with TlsDaemon(tmp_path, host="0.0.0.0") as daemon:
        assert daemon.admin().stats().instance


def test_an_engine_of_this_host_keeps_blocks_over_tls(daemon: TlsDaemon) -> None:
    objects = open_objects(daemon.at(daemon.operator), IDENTITY, 4096)
    try:
        assert objects.wait_attached(20)
        assert objects.put_from([b"key"], bytes(range(256)) * 16).all()
        found = bytearray(4096)
        assert objects.get_into([b"key"], found).all()
        assert found == bytes(range(256)) * 16
    finally:
        objects.close()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvc2", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def options(tls: TlsFiles, ca: str = "--tls-ca") -> list[str]:
    return [
        *("--tls-certificate", str(tls.certificate), "--tls-key", str(tls.key), ca, str(tls.ca))
    ]


def test_commands_reach_it(daemon: TlsDaemon) -> None:
    at = ("--address", f"127.0.0.1:{daemon.port}")
    done = run("stats", "--json", *at, *options(daemon.operator))
    assert (done.returncode, done.stderr) == (0, "")
    assert '"instance"' in done.stdout
    assert run("stats", *at).returncode == 1


def test_commands_refuse_halves(daemon: TlsDaemon) -> None:
    at = ("--address", f"127.0.0.1:{daemon.port}")
    half = run("stats", *at, "--tls-key", str(daemon.operator.key))
    assert (half.returncode, "tls.certificate" in half.stderr) == (2, True)
    unix = run("stats", "--address", "unix:/tmp/kvc2.sock", *options(daemon.operator))
    assert (unix.returncode, "HOST:PORT, with tls" in unix.stderr) == (2, True)


@pytest.mark.parametrize(
    ("spoil", "field", "told"),
    [
        (lambda tls: tls.key.chmod(0o640), "tls.key", ": mode 0600: others may read it"),
        (lambda tls: tls.key.unlink(), "tls.key", ": a readable file"),
        (lambda tls: tls.ca.write_text("nothing"), "tls.client_ca", ": certificates in PEM"),
        (lambda tls: tls.certificate.write_text(""), "tls.key", ": the key, in clear, of"),
        (lambda tls: replace(tls.key, OURS.pair("x").key), "tls.key", ": the key, in clear"),
    ],
    ids=["mode", "missing", "no CA", "no certificate", "another key"],
)
def test_files_that_can_t_be_used_are_refused_at_start(
    tmp_path: Path, spoil: object, field: str, told: str
) -> None:
    """By name; a long path is cut in the message."""
    files = OURS.pair("daemon", HOSTS).files(tmp_path, OURS)
    assert callable(spoil)
    spoil(files)
    listen = ("--listen", "127.0.0.1:0", "--gpu-only", "--tls-administrators", OPERATOR)
    done = run("serve", *listen, *options(files, "--tls-client-ca"))
    assert done.returncode == 2
    assert f"{field} = {str(tmp_path)[:20]!r}"[:-1] in done.stderr
    assert told in done.stderr


def test_a_client_s_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    files = OURS.pair(OPERATOR).files(tmp_path, OURS)
    files.key.chmod(0o644)
    with pytest.raises(InvalidRequest, match=r"^tls\.key = .*: mode 0600"):
        Admin(Address.of_daemon("127.0.0.1:1", tls=files))

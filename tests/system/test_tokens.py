"""Bearer tokens, with processes and files as they are: over TLS whose clients have no certificate,
and in clear on this host.

Not here: what whose token may do (tests/kvc2/server/test_tokens.py, test_credentials.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import free_port
from kvc2.client import Admin, open_objects
from kvc2.errors import Denied, InvalidRequest, Unauthenticated
from kvc2.host.address import Address
from kvc2.host.tls import TlsFiles
from tests.doubles.certificates import HOSTS, CertificateAuthority, replace
from tests.doubles.waiting import wait_until
from tests.system.daemon import DaemonProcess
from tests.system.test_tls import IDENTITY, run

CA = CertificateAuthority()
OPERATOR, TENANT, FRESH = "operator-0123456789", "tenant-0123456789", "fresh-0123456789"


class TokenDaemon(DaemonProcess):
    """Asks for tokens on a port of all interfaces, with TLS; or in clear on one of 127.0.0.1."""

    def __init__(self, folder: Path, *, tls: bool) -> None:
        self.tls: TlsFiles | None = None
        self.port = free_port()
        self.tokens = folder / "tokens.yaml"
        self.write({OPERATOR: "administrator", TENANT: "default"})
        flags = ["--listen", f"{'0.0.0.0' if tls else '127.0.0.1'}:{self.port}"]
        flags += ["--token-file", str(self.tokens)]
        if tls:
            files = CA.pair("daemon", HOSTS).files(folder / "tls", CA)
            flags += ["--tls-certificate", str(files.certificate), "--tls-key", str(files.key)]
            self.tls = TlsFiles(ca=files.ca)
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        super().__init__(folder, *flags, environment=environment)
        self.operator, self.tenant = folder / "operator.token", folder / "tenant.token"
        replace(self.operator, f"{OPERATOR}\n".encode())
        replace(self.tenant, f"{TENANT}\n".encode())

    def write(self, owners: dict[str, str]) -> None:
        replace(self.tokens, "".join(f"{key}: {who}\n" for key, who in owners.items()).encode())

    def at(self, token_file: Path | None) -> Address:
        return Address.of_daemon(f"127.0.0.1:{self.port}", tls=self.tls, token_file=token_file)

    def serves(self) -> bool:
        from kvc2.client.channel import Channel, probe

        if not probe(self.at(None)):
            return False
        channel = Channel(self.at(None))  # health is told to everybody
        try:
            return channel.serves(1.0)
        finally:
            channel.close()

    def admin(self) -> Admin:
        return Admin(self.at(self.operator))

    def options(self, token_file: Path) -> list[str]:
        words = ["--address", f"127.0.0.1:{self.port}", "--token-file", str(token_file)]
        return words if self.tls is None else [*words, "--tls-ca", str(self.tls.ca)]


@pytest.fixture(scope="module", params=["TLS", "clear"])
def daemon(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TokenDaemon]:
    folder = tmp_path_factory.mktemp("tokens")
    with TokenDaemon(folder, tls=request.param == "TLS") as daemon:
        yield daemon


def test_commands_show_their_token(daemon: TokenDaemon) -> None:
    done = run("stats", "--json", *daemon.options(daemon.operator))
    assert (done.returncode, done.stderr) == (0, "")
    assert '"instance"' in done.stdout
    denied = run("stats", *daemon.options(daemon.tenant))
    assert denied.returncode == 1
    assert "owner of the bearer token = 'default': administrator" in denied.stderr


def test_nothing_is_told_without_one(daemon: TokenDaemon) -> None:
    with Admin(daemon.at(None)) as admin, pytest.raises(Unauthenticated, match="Bearer TOKEN"):
        admin.stats()


def test_an_engine_of_this_host_keeps_blocks_with_one_that_changes(daemon: TokenDaemon) -> None:
    """Neither end starts again, nor does the session."""
    objects = open_objects(daemon.at(daemon.tenant), IDENTITY, 4096)
    payload, found = bytes(range(256)) * 16, bytearray(4096)
    try:
        assert objects.wait_attached(20)
        assert objects.put_from([b"key"], payload).all()
        epochs = [each.session_epoch for each in daemon.admin().stats().sessions]

        daemon.write({OPERATOR: "administrator", FRESH: "default"})
        with Admin(daemon.at(daemon.tenant)) as admin:
            wait_until(lambda: _refused(admin) is Unauthenticated)
            with pytest.raises(Unauthenticated):
                objects.exists([b"key"])
            replace(daemon.tenant, FRESH.encode())
            assert _refused(admin) is Denied
        assert objects.get_into([b"key"], found).all()
        assert found == payload
        assert [each.session_epoch for each in daemon.admin().stats().sessions] == epochs
    finally:
        objects.close()
        replace(daemon.tenant, TENANT.encode())
        daemon.write({OPERATOR: "administrator", TENANT: "default"})
        with Admin(daemon.at(daemon.tenant)) as admin:
            wait_until(lambda: _refused(admin) is Denied)


def _refused(admin: Admin) -> type[Exception]:
    with pytest.raises((Unauthenticated, Denied)) as caught:
        admin.stats()
    return caught.type


def test_neither_ps_nor_the_log_shows_one(daemon: TokenDaemon) -> None:
    known = [each.encode() for each in (OPERATOR, TENANT, FRESH)]
    for name in ("cmdline", "environ"):
        told = Path(f"/proc/{daemon.pid}/{name}").read_bytes()
        assert b"tokens.yaml" in told or name == "environ"
        assert not any(each in told for each in known)
    assert "token_file_read" in daemon.log.read_text() or "serving" in daemon.log.read_text()
    assert not any(each in daemon.log.read_bytes() for each in known)


def test_a_file_that_others_may_read_is_refused_at_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TENANT}: default\n")
    path.chmod(0o644)
    listen = ("--listen", "127.0.0.1:0", "--gpu-only")
    for words in (("serve", *listen), ("stats", "--address", "127.0.0.1:1")):
        done = run(*words, "--token-file", str(path))
        assert done.returncode == 2
        assert "mode 0600: others may read it" in done.stderr
        assert TENANT not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--listen", "0.0.0.0:0"), "a loopback address: a public one needs TLS"),
        (("--listen", "unix:/tmp/kvc2-none.sock"), "only with listen on HOST:PORT"),
    ],
)
def test_a_daemon_refuses_tokens_that_all_could_read_or_nobody_needs(
    tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    done = run("serve", *words, "--token-file", str(tmp_path / "t"))
    assert (done.returncode, told in done.stderr) == (2, True)


def test_a_client_sends_no_token_in_clear_to_another_host(tmp_path: Path) -> None:
    for text in ("example.org:1", "192.0.2.1:1", "unix:/tmp/kvc2-none.sock"):
        with pytest.raises(InvalidRequest, match="with token_file"):
            Address.of_daemon(text, token_file=tmp_path / "t")
    half = run("stats", "--address", "127.0.0.1:1", "--tls-ca", str(tmp_path / "ca.pem"))
    assert (half.returncode, "token_file: a path, with tls.ca alone" in half.stderr) == (2, True)


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"\xff\xfe", b"a\nb"])
def test_a_client_s_file_without_a_token_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    replace(path, content)
    with pytest.raises(InvalidRequest, match=r"^token_file = .*: one bearer token in it"):
        Admin(Address.of_daemon("127.0.0.1:1", token_file=path))

"""The PEM files of one end of a TLS connection whose both ends show a certificate.

Read and checked together, so that nobody begins with a key that isn't the certificate's. Not here:
gRPC's credentials (client/channel.py, server/tls.py), and whose name a certificate has
(server/callers.py).
"""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvc2 import errors

FILE_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class Pems:
    """What the files held at one moment."""

    certificate: bytes
    key: bytes = field(repr=False)
    ca: bytes


@dataclass(frozen=True)
class TlsFiles:
    """`certificate`: this end's, and those between it and its CA. `key`: of that certificate,
    readable by its owner alone. `ca`: one of these has signed the other end's certificate.
    `ca_field` is its name in errors."""

    certificate: Path
    key: Path
    ca: Path
    ca_field: str = "tls.ca"

    def read(self) -> Pems:
        """Raises InvalidRequest for the file that can't be used, by name."""
        found = self.as_they_are()
        self.check(found)
        return found

    def as_they_are(self) -> Pems:
        """Unchecked but for who may read the key. Raises InvalidRequest."""
        return Pems(
            _read("tls.certificate", self.certificate),
            _read("tls.key", self.key, secret=True),
            _read(self.ca_field, self.ca),
        )

    def check(self, found: Pems) -> None:
        """Raises InvalidRequest for what no TLS can begin with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._check_loads(context, found)
        try:
            context.load_verify_locations(cadata=found.ca.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            allowed = f"certificates in PEM: {_reason(error)}"
            raise errors.InvalidRequest(self.ca_field, str(self.ca), allowed) from None

    def _check_loads(self, context: ssl.SSLContext, found: Pems) -> None:
        """OpenSSL takes the two from files alone: from those that hold just what was read."""
        with _held(found.certificate) as certificate, _held(found.key) as key:
            try:
                # asked for a passphrase, it would ask the terminal
                context.load_cert_chain(certificate, key, password=lambda: b"")
            except (ssl.SSLError, ValueError) as error:
                path = str(self.key)
                allowed = f"the key, in clear, of {self.certificate}, both in PEM: {_reason(error)}"
                raise errors.InvalidRequest("tls.key", path, allowed) from None


def _read(name: str, path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        allowed = f"a readable file: {error.strerror}"
        raise errors.InvalidRequest(name, str(path), allowed) from error
    if secret and stat.S_IMODE(facts.st_mode) & 0o077:
        raise errors.InvalidRequest(name, str(path), "mode 0600: others may read it")
    if len(content) > FILE_BYTES_MAX:
        raise errors.InvalidRequest(name, str(path), f"at most {FILE_BYTES_MAX} bytes")
    return content


@contextlib.contextmanager
def _held(content: bytes) -> Iterator[str]:
    """The path of a file in memory, of this process alone."""
    with os.fdopen(os.memfd_create("kvc2-pem", os.MFD_CLOEXEC), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or "it can't be parsed"
    return str(reason).replace("_", " ").lower()

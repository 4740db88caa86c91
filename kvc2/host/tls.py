"""The PEM files of one end of a TLS connection.

Read and checked together, so that nobody begins with a key that isn't the certificate's. Not here:
gRPC's credentials (client/channel.py, server/tls.py), and whose name a certificate has
(server/credentials.py).
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvc2 import errors
from kvc2.host.private_file import read_file


@dataclass(frozen=True)
class Pems:
    """What the files held at one moment."""

    certificate: bytes | None
    key: bytes | None = field(repr=False)
    ca: bytes | None


@dataclass(frozen=True)
class TlsFiles:
    """`certificate`: this end's, and those between it and its CA. `key`: of that certificate,
    readable by its owner alone. `ca`: one of these has signed the other end's certificate. An end
    without the first two shows no certificate; one without the last asks for none. `ca_field` is
    its name in errors. Raises InvalidRequest for a certificate or a key alone, and for no file."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    ca_field: str = "tls.ca"

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            allowed = "both tls.certificate and tls.key, or none"
            raise errors.InvalidRequest(f"tls.{missing}", None, allowed)
        if self.certificate is None and self.ca is None:
            raise errors.InvalidRequest(self.ca_field, None, "a path")

    def read(self) -> Pems:
        """Raises InvalidRequest for the file that can't be used, by name."""
        found = self.as_they_are()
        self.check(found)
        return found

    def as_they_are(self) -> Pems:
        """Unchecked but for who may read the key. Raises InvalidRequest."""
        return Pems(
            _read("tls.certificate", self.certificate),
            _read("tls.key", self.key, private=True),
            _read(self.ca_field, self.ca),
        )

    def check(self, found: Pems) -> None:
        """Raises InvalidRequest for what no TLS can begin with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if found.certificate is not None and found.key is not None:
            self._check_loads(context, found.certificate, found.key)
        if found.ca is None:
            return
        try:
            context.load_verify_locations(cadata=found.ca.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            allowed = f"certificates in PEM: {_reason(error)}"
            raise errors.InvalidRequest(self.ca_field, str(self.ca), allowed) from None

    def _check_loads(self, context: ssl.SSLContext, pem: bytes, key_pem: bytes) -> None:
        """OpenSSL takes the two from files alone: from those that hold just what was read."""
        with _held(pem) as certificate, _held(key_pem) as key:
            try:
                # asked for a passphrase, it would ask the terminal
                context.load_cert_chain(certificate, key, password=lambda: b"")
            except (ssl.SSLError, ValueError) as error:
                path = str(self.key)
                allowed = f"the key, in clear, of {self.certificate}, both in PEM: {_reason(error)}"
                raise errors.InvalidRequest("tls.key", path, allowed) from None


def _read(field: str, path: Path | None, *, private: bool = False) -> bytes | None:
    return None if path is None else read_file(field, path, private=private)


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

"""Where a daemon listens, as text and as gRPC wants it: the one place that reads an address.

gRPC reads its targets as URIs, in which `#`, `?` and `%` mean something; a path means itself. Not
here: which addresses a daemon may serve (config.py), the socket's folder and lock (server/).
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import urllib.parse
from dataclasses import dataclass, replace
from pathlib import Path

from kvc2 import errors
from kvc2.host.loopback import is_loopback
from kvc2.host.paths import user_path
from kvc2.host.tls import TlsFiles

SOCKET_PATH_BYTES_MAX = 107  # sun_path
PORT_MAX = 65535
FORMS = "unix:PATH or HOST:PORT"


@dataclass(frozen=True)
class Address:
    """`path`, absolute, of a unix socket; or None, and `host` (an IPv6 one without brackets) and
    `port`; then `tls`: how it is spoken to, None: in clear; and `token_file`: what has the bearer
    token that each call shows."""

    path: Path | None
    host: str = ""
    port: int = 0
    tls: TlsFiles | None = None
    token_file: Path | None = None

    @classmethod
    def parse(
        cls, text: str, *, field: str = "address", path_bytes_max: int = SOCKET_PATH_BYTES_MAX
    ) -> Address:
        """Raises InvalidRequest for what no daemon can listen at."""
        kind, _, rest = text.partition(":")
        if kind == "unix":
            return cls(_socket_path(text, rest, field, path_bytes_max))
        if kind == "unix-abstract":
            raise errors.InvalidRequest(field, text, "unix:PATH: an abstract socket has no owner")
        host, _, port = text.rpartition(":")
        if not re.fullmatch(r"[0-9]{1,5}", port) or not _is_host(host):
            meant = f"; did you mean unix:{text}?" if text[:1] in tuple("/.~") else ""
            raise errors.InvalidRequest(field, text, f"{FORMS}, [IPv6]:PORT{meant}")
        if int(port) > PORT_MAX:
            raise errors.InvalidRequest(field, text, f"{FORMS}, port 1 to {PORT_MAX}")
        return cls(None, host.strip("[]"), int(port))

    @classmethod
    def of_daemon(
        cls,
        text: str | Address,
        *,
        field: str = "address",
        tls: TlsFiles | None = None,
        token_file: str | Path | None = None,
    ) -> Address:
        """One to connect to, as its caller's settings have it, or one that is made already. A token
        in clear goes no further than this host. Raises InvalidRequest."""
        if isinstance(text, Address):
            if tls is not None or token_file is not None:
                allowed = "text, with tls or token_file: this has its own"
                raise errors.InvalidRequest(field, str(text), allowed)
            return text
        if not isinstance(text, str):
            raise errors.InvalidRequest(field, text, FORMS)
        found = cls.parse(text, field=field)
        if found.path is None and found.port == 0:
            raise errors.InvalidRequest(field, text, f"{FORMS}, port 1 to {PORT_MAX}")
        if found.path is not None and tls is not None:
            raise errors.InvalidRequest(field, text, "HOST:PORT, with tls")
        if token_file is None:
            return replace(found, tls=tls)
        if found.path is not None:
            raise errors.InvalidRequest(field, text, "HOST:PORT, with token_file")
        if tls is None and not is_loopback(found.host):
            allowed = "a loopback address, with token_file and no tls: all could read the token"
            raise errors.InvalidRequest(field, text, allowed)
        return replace(found, tls=tls, token_file=user_path("token_file", token_file))

    def __str__(self) -> str:
        """As it is written, without the files of TLS and token."""
        return self.grpc_target if self.path is None else f"unix:{self.path}"

    @property
    def grpc_target(self) -> str:
        """For a channel, and for a server's port."""
        if self.path is not None:  # of bytes: a name needs not be UTF-8
            return "unix:" + urllib.parse.quote(os.fsencode(self.path))
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def connect(self, timeout_s: float) -> socket.socket:
        """A plain connection. Raises OSError."""
        if self.path is None:
            return socket.create_connection((self.host, self.port), timeout_s)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(timeout_s)
            connection.connect(os.fsencode(self.path))
        except OSError:
            connection.close()
            raise
        return connection


def _is_host(host: str) -> bool:
    if host.startswith("["):
        try:
            return host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            return False
    return re.fullmatch(r"[A-Za-z0-9._-]+", host) is not None


def _socket_path(text: str, rest: str, field: str, bytes_max: int) -> Path:
    """The path of unix:`rest`. Raises InvalidRequest."""

    def refused(allowed: str) -> errors.InvalidRequest:
        return errors.InvalidRequest(field, text, allowed)

    if rest.startswith("//"):
        if not rest.startswith("///"):
            raise refused("unix:PATH or unix:///PATH: two slashes would begin a host's name")
        rest = "/" + rest.lstrip("/")
    if rest.startswith("@"):
        raise refused(f"not an abstract socket, which has no owner; a file is unix:./{rest}")
    if "," in rest:
        raise refused("a path without a comma: gRPC takes it for a list of paths")
    try:
        rest.encode()
    except UnicodeEncodeError:
        raise refused("a path in UTF-8") from None
    path = user_path(field, rest, shown=text, allowed=FORMS)
    size = len(os.fsencode(path))
    if size > bytes_max:
        raise refused(f"unix:PATH of 1 to {bytes_max} bytes: from the root it has {size}")
    if rest.endswith(("/", "/.")) or os.path.isdir(path):  # also what ends with ..
        raise refused("the path of a socket, not of a folder")
    return path

"""Where a remote store is, as its users write it: the one place that reads such a URL.

A password may stand in it, so that no error, log line or repr shows the text as it was given. Not
here: who connects (tiers/remote/), which settings go together (config.py).
"""

from __future__ import annotations

import os
import re
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from kvc2 import errors
from kvc2.host.loopback import is_loopback

FORMS = (
    "redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], rediss://... (TLS), unix://PATH, "
    "mooncake://HOST:PORT, mooncake+file:///PATH, mooncake+env: or s3://BUCKET[/PREFIX]"
)
PORT = 6379
MASTER_PORT = 50051
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
DATABASES_MAX = 1 << 16


def masked(text: str) -> str:
    """`text` without what may be a password, also in what is no URL of a store."""
    if re.search(r"[?#]", text):
        return "..."
    return re.sub(r"^([a-z]+://)?.*@", r"\1...@", text, flags=re.DOTALL)


@dataclass(frozen=True)
class StoreUrl:
    """`path`: of a unix socket, or None. An empty `user` is the store's default one."""

    host: str
    port: int = PORT
    database: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    path: Path | None = None

    @classmethod
    def parse(cls, text: str, *, field: str) -> StoreUrl:
        """Raises InvalidRequest."""
        parts, port = _split(text, field)
        port = PORT if port is None else port
        user = urllib.parse.unquote(parts.username or "")
        password = urllib.parse.unquote(parts.password or "")
        if user and not password:
            raise errors.InvalidRequest(field, masked(text), f"{FORMS}: a user has a password")
        if parts.scheme == "unix":
            path = Path(urllib.parse.unquote(parts.path))
            if not path.is_absolute() or path == Path("/") or parts.hostname:
                raise errors.InvalidRequest(field, masked(text), "unix:///PATH, absolute")
            return cls("", 0, 0, user, password, path=path)
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise errors.InvalidRequest(field, masked(text), FORMS)
        if not port:
            raise errors.InvalidRequest(field, masked(text), f"{FORMS}: PORT is 1 to 65535")
        database = _database(parts.path, field, text)
        tls = parts.scheme == "rediss"
        return cls(parts.hostname, port, database, user, password, tls)

    @property
    def is_local(self) -> bool:
        """Whether what goes there stays on this host."""
        return self.path is not None or is_loopback(self.host)

    @property
    def shown(self) -> str:
        """For logs: without user and password."""
        if self.path is not None:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' * self.tls}://{host}:{self.port}/{self.database}"


@dataclass(frozen=True)
class MooncakeUrl:
    """Mooncake Store: its master, or its own configuration: in `file`, or (neither) as its
    variables say."""

    master: str = ""
    file: Path | None = None
    tls: bool = False
    is_local: bool = False  # its nodes are wherever they are

    @classmethod
    def parse(cls, text: str, *, field: str) -> MooncakeUrl:
        """Raises InvalidRequest."""
        parts, port = _split(text, field)
        kind, path = parts.scheme, urllib.parse.unquote(parts.path)
        if kind == "mooncake+env" and not (parts.netloc or path):
            return cls()
        if kind == "mooncake+file" and not parts.netloc and Path(path).is_absolute():
            return cls(file=Path(path))
        if kind == "mooncake" and parts.hostname and path in ("", "/") and "@" not in parts.netloc:
            host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            return cls(f"{host}:{MASTER_PORT if port is None else port}")
        allowed = "mooncake://HOST[:PORT], mooncake+file:///PATH, absolute, or mooncake+env:"
        raise errors.InvalidRequest(field, masked(text), allowed)

    @property
    def shown(self) -> str:
        """For logs."""
        if self.file is not None:
            return f"mooncake+file://{self.file}"
        return f"mooncake://{self.master}" if self.master else "mooncake+env:"

    @property
    def spec(self) -> str:
        """As the process that has its client is told."""
        if self.file is not None:
            return f"file:{self.file}"
        return f"master:{self.master}" if self.master else "env:"


@dataclass(frozen=True)
class S3Url:
    """A bucket, and what the names in it begin with. Where it is, its variables say."""

    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: str, *, field: str) -> S3Url:
        """Raises InvalidRequest."""
        parts, port = _split(text, field)
        prefix = urllib.parse.unquote(parts.path).strip("/")
        if parts.scheme != "s3" or port is not None or not re.fullmatch(BUCKET, parts.netloc):
            raise errors.InvalidRequest(field, masked(text), "s3://BUCKET[/PREFIX]")
        return cls(parts.netloc, prefix)

    @property
    def _endpoint(self) -> urllib.parse.SplitResult:
        found = (os.environ.get(each) for each in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
        return urllib.parse.urlsplit(next(filter(None, found), "https://"))

    @property
    def tls(self) -> bool:
        return self._endpoint.scheme != "http"

    @property
    def is_local(self) -> bool:
        """Whether what goes there stays on this host."""
        return is_loopback(self._endpoint.hostname or "")

    @property
    def shown(self) -> str:
        """For logs."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


AnyUrl = StoreUrl | MooncakeUrl | S3Url


def parse(text: str, *, field: str) -> AnyUrl:
    """Raises InvalidRequest."""
    if text.startswith("mooncake"):
        return MooncakeUrl.parse(text, field=field)
    found = S3Url if text.startswith("s3:") else StoreUrl
    return found.parse(text, field=field)


def _split(text: str, field: str) -> tuple[urllib.parse.SplitResult, int | None]:
    """With its port, if it names one. Raises InvalidRequest."""
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError:  # a port that is no number, a bracket that isn't closed
        # not its cause: that quotes the text
        raise errors.InvalidRequest(field, masked(text), FORMS) from None
    if parts.query or parts.fragment:
        allowed = f"{FORMS}, and nothing after it: other settings are flags"
        raise errors.InvalidRequest(field, masked(text), allowed)
    return parts, port


def _database(path: str, field: str, text: str) -> int:
    found = re.fullmatch(r"/?|/([0-9]{1,5})", path)
    if found is None or int(found[1] or 0) >= DATABASES_MAX:
        raise errors.InvalidRequest(
            field, masked(text), f"{FORMS}: DATABASE is 0 to {DATABASES_MAX - 1}"
        )
    return int(found[1] or 0)

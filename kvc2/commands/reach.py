"""How a command reaches the daemon: options that all of them have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kvc2 import errors, flags
from kvc2.config import default_listen
from kvc2.flags import Flag, check
from kvc2.host.address import Address
from kvc2.host.tls import TlsFiles

if TYPE_CHECKING:
    from kvc2.client import Admin

NO_TLS = "no TLS"


@dataclass(frozen=True)
class TlsOptions:
    """`ca` alone, or all three."""

    certificate: Annotated[
        Path | None,
        Flag("This caller's certificate, in PEM, of the daemon's tls.client_ca.", shown=NO_TLS),
    ] = None
    key: Annotated[
        Path | None, Flag("Its key in PEM, readable by its owner alone.", shown=NO_TLS)
    ] = None
    ca: Annotated[
        Path | None,
        Flag(
            "In PEM; one of these has signed the daemon's certificate, which has its host's name.",
            shown=NO_TLS,
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self, "tls")
        given = {name: getattr(self, name) for name in ("certificate", "key", "ca")}
        missing = [name for name, path in given.items() if path is None]
        if missing and missing not in (["certificate", "key"], list(given)):
            allowed = "all three of TLS, or tls.ca alone, with token_file"
            raise errors.InvalidConfig(f"tls.{missing[0]}", None, allowed)

    @property
    def files(self) -> TlsFiles | None:
        return None if self.ca is None else TlsFiles(self.certificate, self.key, self.ca)


@dataclass(frozen=True)
class Reach:
    """The daemon's address, and how either end knows the other."""

    address: Annotated[
        str | None,
        Flag(
            "The daemon's address, unix:PATH (~ is a home) or HOST:PORT.",
            shown="as `kvc2 serve`'s",
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        Flag(
            "Holds this caller's bearer token, readable by its owner alone. In clear only of a "
            "loopback address.",
            shown="no token",
        ),
    ] = None
    tls: TlsOptions = field(default_factory=TlsOptions)

    def __post_init__(self) -> None:
        check(self)
        if self.tls.ca is not None and self.tls.certificate is None and self.token_file is None:
            raise errors.InvalidConfig("token_file", None, "a path, with tls.ca alone")


def admin(given: dict[str, Any]) -> Admin:
    """Of the options of `Reach`, None for what is not given. Raises InvalidConfig and
    InvalidRequest."""
    from kvc2.client import Admin

    reach = flags.build(Reach, flags.nested(Reach, given))
    text = reach.address or default_listen()
    return Admin(Address.of_daemon(text, tls=reach.tls.files, token_file=reach.token_file))

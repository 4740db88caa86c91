"""Tenants: their secrets and who may open their namespaces.

A secret never leaves this file but as the key of an HMAC. The default tenant belongs to the
socket's owner; its secret is made once and kept beside the disk tier's files, since it must be the
same after a restart for what the disk holds to be found.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from kvc2 import errors
from kvc2.config import DEFAULT_TENANT, ServeConfig
from kvc2.flags import refused_as
from kvc2.host.private_file import read_file
from kvc2.namespace import SECRET_BYTES_MIN, namespace
from kvc2.server.credentials import Credential
from kvc2.tiers.remote.codec import Shared, mac_key, shared_key

SECRET_FILE = "default-tenant.secret"
SECRET_BYTES = 32
SECRET_BYTES_MAX = 4096  # of a longer file only these count


class Tenants:
    """Secrets by tenant. Raises InvalidConfig for a secret file that others can read."""

    def __init__(self, config: ServeConfig) -> None:
        owner = os.getuid()
        self._secrets = {DEFAULT_TENANT: _default_secret(config.disk.path)}
        self._shared: dict[str, bytes] = {}
        self._uids = {DEFAULT_TENANT: {owner}}
        for index, each in enumerate(config.tenants):
            if each.secret_file is None:  # the default tenant's
                continue
            self._secrets[each.name] = _read_secret(f"tenants[{index}]", each.secret_file)
            self._uids[each.name] = set(each.uids) or {owner}
        self._ttls = {each.name: each.ttl_s for each in config.tenants}
        if config.remote.url is not None and config.remote.secret_file is not None:
            secret = _read_secret("remote", config.remote.secret_file)
            # the default tenant's own secret is another one on each host
            own = {**self._secrets, DEFAULT_TENANT: b""}
            self._shared = {name: shared_key(secret, each) for name, each in own.items()}

    def ttl_s(self, tenant: str) -> int:
        """How long after its last use a block of the tenant matches; 0: for ever."""
        return self._ttls.get(tenant or DEFAULT_TENANT, 0)

    def shared(
        self, tenant: str, identity: bytes, salt: bytes, *, opaque: bool = False
    ) -> Shared | None:
        """The namespace of a known tenant as other hosts know it; None: there is no store."""
        key = self._shared.get(tenant or DEFAULT_TENANT)
        if key is None:
            return None
        name = namespace(key, identity, salt, opaque=opaque)
        return Shared(name, mac_key(key, name))

    def check_credential(self, tenant: str, caller: Credential | None) -> None:
        """Raises Denied where a call's credential is not this tenant's, known or not."""
        name = tenant or DEFAULT_TENANT
        if caller is not None and name not in caller.tenants:
            raise errors.Denied("tenant", name, f"not open to the {caller.kind} of {caller}")

    def namespace(
        self, tenant: str, uid: int, identity: bytes, salt: bytes, *, opaque: bool = False
    ) -> bytes:
        """The 32 bytes that name (identity, tenant, salt). Raises NotFound and Denied."""
        name = tenant or DEFAULT_TENANT
        secret = self._secrets.get(name)
        if secret is None:
            raise errors.NotFound("tenant", name, "a tenant of the daemon's configuration")
        if uid not in self._uids[name]:
            raise errors.Denied("tenant", name, f"not open to user id {uid}")
        return namespace(secret, identity, salt, opaque=opaque)


def _default_secret(disk: Path | None) -> bytes:
    if disk is None:  # nothing that it names outlives this process
        return secrets.token_bytes(SECRET_BYTES)
    disk.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = disk / SECRET_FILE
    if not path.exists():
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, secrets.token_bytes(SECRET_BYTES))
            os.fsync(fd)
        finally:
            os.close(fd)
        fresh.rename(path)  # whole or not at all: half a secret would orphan the whole disk
    return _read_secret("disk.path", path)


def _read_secret(field: str, path: Path) -> bytes:
    with refused_as(f"{field}.secret_file", str(path)):
        secret = read_file(f"{field}.secret_file", path, private=True)[:SECRET_BYTES_MAX]
    if len(secret) < SECRET_BYTES_MIN:
        raise errors.InvalidConfig(
            f"{field}.secret_file", str(path), f"at least {SECRET_BYTES_MIN} bytes in it"
        )
    return secret

"""Which hosts share what in a remote store: the secret file, tenants and their secrets, salts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvc2.config import DiskConfig, RemoteConfig, ServeConfig, TenantConfig
from kvc2.errors import InvalidConfig
from kvc2.server.tenants import Tenants
from kvc2.tiers.remote.codec import Shared
from tests.doubles.engines import identity

IDENTITY = identity().encode()


def written(path: Path, secret: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(secret)
    path.chmod(mode)
    return path


def tenants(folder: Path, secret: bytes, own: bytes = b"the tenant's own one") -> Tenants:
    """Of a host of its own."""
    folder.mkdir()
    return Tenants(
        ServeConfig(
            listen=f"unix:{folder / 'socket'}",
            disk=DiskConfig.of_bytes(folder / "disk", 1 << 20),
            remote=RemoteConfig("redis://store", written(folder / "remote", secret)),
            tenants=(TenantConfig("mine", written(folder / "mine", own), (os.getuid(),)),),
        )
    )


def shared(of: Tenants, tenant: str = "", salt: bytes = b"", *, opaque: bool = False) -> Shared:
    found = of.shared(tenant, IDENTITY, salt, opaque=opaque)
    assert found is not None
    return found


def test_hosts_with_one_secret_share_what_their_own_secrets_keep_apart(tmp_path: Path) -> None:
    a, b = (tenants(tmp_path / name, b"one secret of all") for name in "ab")
    uid = os.getuid()
    assert a.namespace("", uid, IDENTITY, b"") != b.namespace("", uid, IDENTITY, b"")
    for tenant in ("", "default", "mine"):
        assert shared(a, tenant) == shared(b, tenant)
    c = tenants(tmp_path / "c", b"another secret of others")
    assert shared(a).name != shared(c).name
    assert shared(a).key != shared(c).key


def test_tenants_salts_and_keys_are_apart(tmp_path: Path) -> None:
    a = tenants(tmp_path / "a", b"one secret of all")
    b = tenants(tmp_path / "b", b"one secret of all", own=b"another tenant's secret")
    found = [shared(a), shared(a, "mine"), shared(b, "mine"), shared(a, salt=b"s")]
    found.append(shared(a, opaque=True))
    assert len({each.name for each in found}) == len({each.key for each in found}) == 5


def test_no_secret_is_in_a_repr(tmp_path: Path) -> None:
    found = shared(tenants(tmp_path / "a", b"one secret of all"))
    assert repr(found.key) not in repr(found)


@pytest.mark.parametrize(
    ("secret", "mode", "message"),
    [(b"long enough a secret", 0o644, "mode 0600"), (b"short", 0o600, "at least 16 bytes")],
)
def test_a_secret_that_others_can_read_or_guess_is_refused(
    tmp_path: Path, secret: bytes, mode: int, message: str
) -> None:
    config = ServeConfig(
        disk=DiskConfig.of_bytes(tmp_path / "disk", 1 << 20),
        remote=RemoteConfig("redis://store", written(tmp_path / "remote", secret, mode)),
    )
    with pytest.raises(InvalidConfig, match=r"remote\.secret_file") as caught:
        Tenants(config)
    assert message in str(caught.value)


def test_a_secret_that_is_missing_is_named(tmp_path: Path) -> None:
    config = ServeConfig(
        disk=DiskConfig.of_bytes(tmp_path / "disk", 1 << 20),
        remote=RemoteConfig("redis://store", tmp_path / "nowhere"),
    )
    with pytest.raises(InvalidConfig, match=r"remote\.secret_file"):
        Tenants(config)

"""URLs of remote stores: what they mean, and that no password of one is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvc2 import flags
from kvc2.config import ServeConfig
from kvc2.errors import InvalidConfig, InvalidRequest
from kvc2.host.store_url import MooncakeUrl, StoreUrl, masked
from kvc2.host.store_url import parse as parse_any


def parse(text: str) -> StoreUrl:
    found = parse_any(text, field="url")
    assert isinstance(found, StoreUrl)
    return found


def parse_mooncake(text: str) -> MooncakeUrl:
    found = parse_any(text, field="url")
    assert isinstance(found, MooncakeUrl)
    return found


def test_each_part_is_read() -> None:
    assert parse("redis://store") == StoreUrl("store", 6379)
    assert parse("redis://store:7000/3") == StoreUrl("store", 7000, 3)
    assert parse("redis://:p%40s@[::1]:7/") == StoreUrl("::1", 7, password="p@s")
    assert parse("rediss://u:p@store") == StoreUrl("store", user="u", password="p", tls=True)
    assert parse("unix:///run/store.sock").path == Path("/run/store.sock")
    assert parse("unix://:p@/run/store.sock").password == "p"


def test_a_mooncake_is_named_by_its_master_or_by_its_own_configuration() -> None:
    assert parse_mooncake("mooncake://store:7000").spec == "master:store:7000"
    assert parse_mooncake("mooncake://store/").spec == "master:store:50051"
    assert parse_mooncake("mooncake://[::1]:7").spec == "master:[::1]:7"
    file = parse_mooncake("mooncake+file:///etc/moon%20cake.json")
    assert (file.spec, file.file) == ("file:/etc/moon cake.json", Path("/etc/moon cake.json"))
    assert parse_mooncake("mooncake+env:").spec == "env:"
    shown = [parse_mooncake(each).shown for each in ("mooncake://h:1", "mooncake+file:///a")]
    assert shown == ["mooncake://h:1", "mooncake+file:///a"]


@pytest.mark.parametrize(
    "text",
    [
        *("store:6379", "http://store", "redis://", "redis://:secret@", "redis://store/db"),
        *("redis://store/70000", "redis://store:99999", "redis://store:x", "redis://[::1"),
        *("redis://secret@store", "redis://store?db=1", "redis://store#x", "unix://run/store"),
        *("unix:///", "redis://u:secret@store/1/2", "mooncakes://store", "", "redis://store:0"),
        *("mooncake://", "mooncake://u:secret@store", "mooncake://store/x", "mooncake+file:a.json"),
        *("mooncake+env:x", "mooncake+env://x", "mooncake+file://host/a", "mooncake+file:"),
        *(
            "s3://",
            "s3://B",
            "s3://user:secret@bucket",
            "s3://bucket:9000",
            "s3://b_d",
            "s3:bucket",
        ),
        *("mooncake://store:70000", "mooncake://store?x=secret", "mooncake:store:1"),
        *("redis:/:secret@store", ":secret@store:6379", "redis:user:secret@store"),
        *("redis://store/0?password=secret", "redis://:secret#x@store", "redis://:#secret@store"),
    ],
)
def test_what_is_no_url_is_refused_and_no_secret_is_shown(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_password_is_shown_nowhere() -> None:
    url = parse("rediss://user:secret@store:1/2")
    assert "secret" not in repr(url) + url.shown
    assert url.shown == "rediss://store:1/2"
    assert "secret" not in masked("redis://user:se@cret@secret@store")
    assert "secret" not in masked("redis://:secret@store\n:secret@x")


def test_what_stays_on_the_host_is_known() -> None:
    assert all(parse(each).is_local for each in ("redis://localhost", "redis://127.0.0.9"))
    assert parse("unix:///run/store").is_local
    assert not parse("redis://10.0.0.1").is_local


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "redis://:secret@h/x"}, "remote.url = 'redis://...@h/x'"),
        ({"url": "redis://h"}, "remote.secret_file: a path, with remote.url"),
        ({"url": "redis://h", "secret_file": "/s", "ca_file": "/c"}, "remote.ca_file = '/c': only"),
        (
            {"url": "redis://:secret@h", "secret_file": "/s"},
            "remote.url = 'redis://...@h': a daemon",
        ),
        ({"patience_ms": 0}, "remote.patience_ms = 0: 1 to 10000"),
        ({"deadline_ms": 1}, "remote.deadline_ms = 1: 10 to"),
        ({"queue_mb": 0}, "remote.queue_mb = 0: 1 to"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(values: flags.Values, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        flags.build(ServeConfig, {"remote": values})
    assert message in str(caught.value)
    assert "secret@" not in str(caught.value)

"""Whose each rpc is: the table of the README, the one of the code, and what the daemon does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvc2.server import callers
from kvc2.server.callers import WHOSE
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.wires import Wire, u32

README = Path(callers.__file__).with_name("README.md")
OF_SESSIONS = sorted(each for each in WHOSE if WHOSE[each] == "session")
NAMESPACE = {"namespace": bytes(32), "tokens": u32(*range(16))}


@pytest.fixture(scope="module")
def on_tcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDaemon]:
    config = serve_config(tmp_path_factory.mktemp("daemon"), listen="127.0.0.1:0")
    with ServedDaemon(config, cache=None) as daemon:
        yield daemon


def rpcs() -> set[str]:
    services = pb.DESCRIPTOR.services_by_name.values()
    return {method.name for service in services for method in service.methods}


def test_the_readme_has_a_row_for_each_rpc() -> None:
    text = README.read_text().partition("## Whose an rpc is")[2].partition("##")[0]
    rows = re.findall(r"^\| ([\w, ]+) \| ([\w ]+) \|", text, re.M)
    told = {name: whose for names, whose in rows for name in names.split(", ")}
    told.pop("rpc")
    assert told == WHOSE
    assert WHOSE.keys() == rpcs()


@pytest.mark.parametrize("rpc", OF_SESSIONS)
def test_a_session_s_call_needs_its_secret(on_tcp: ServedDaemon, rpc: str) -> None:
    kind = getattr(pb, f"{rpc}Request")
    with Wire(
        f"127.0.0.1:{on_tcp.daemon.port}"
    ) as wire:  # on the wire all kinds of calls are alike
        assert wire.refusal(rpc, kind())[0] == "FAILED_PRECONDITION"


@pytest.mark.parametrize("rpc", ["Explain", "Pin", "Unpin", "Prefetch"])
def test_an_owner_s_call_is_denied_over_tcp(on_tcp: ServedDaemon, rpc: str) -> None:
    kind = getattr(pb, f"{rpc}Request")
    with Wire(f"127.0.0.1:{on_tcp.daemon.port}") as wire:
        assert wire.refusal(rpc, kind(**NAMESPACE))[0] == "PERMISSION_DENIED"


@pytest.mark.parametrize("rpc", ["Stats", "Flush", "Evict"])
def test_an_administrator_s_call_needs_nothing_but_the_address(
    on_tcp: ServedDaemon, rpc: str
) -> None:
    request = {"Evict": pb.EvictRequest(tier="cpu", blocks=1)}
    with Wire(f"127.0.0.1:{on_tcp.daemon.port}") as wire:
        wire.call(rpc, request.get(rpc, getattr(pb, f"{rpc}Request")()))

"""Limits of calls and bytes a second of a tenant, on a clock of the test's own: what is counted is
counted, not timed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc2 import _core
from kvc2.config import LimitsConfig, TenantConfig
from kvc2.errors import RateLimited
from kvc2.server.callers import WHOSE
from kvc2.server.rates import Bucket
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.callers import OPERATOR, PROMPT, Callers, Clock, status
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import LAYERS, PAGE_SIZE, SEGMENT_BYTES, TinyEngine, identity
from tests.doubles.wires import Wire, granted, grants, hello, memfd, pages, u32
from tests.kvc2.server.test_streams import Remote

PAGE_BYTES = 2 * LAYERS * SEGMENT_BYTES  # of a payload
TOKENS = np.frombuffer(PROMPT, "<u4")


class House:
    """A daemon with tenants a and b, on a clock that stands unless it is moved."""

    def __init__(self, served: ServedDaemon, clock: Clock) -> None:
        self.served, self.clock = served, clock

    @contextmanager
    def session(self, *tenants: str) -> Iterator[Wire]:
        """With a namespace of each; the clock ends it 30 s later."""
        with Wire(self.served.address) as wire:
            attached = wire.attach(hello(expiry_ms=30_000))
            assert wire.side(attached, attached.nonce, [memfd()]) == b"ok"
            assert next(wire.stream).WhichOneof("message") == "ready"
            for tenant in tenants:
                wire.open_namespace(tenant=tenant)
            yield wire

    def counters(self, name: str) -> dict[str, float]:
        found = self.served.daemon.metrics.values()
        return {key: value for key, value in found.items() if key.startswith(name) and value}


@contextmanager
def house(
    folder: Path, limits: dict[str, Any], of_a: dict[str, Any] | None = None
) -> Iterator[House]:
    def tenant(name: str, own: dict[str, Any]) -> TenantConfig:
        secret = folder / f"{name}.secret"
        secret.write_bytes(name.encode() * 32)
        secret.chmod(0o600)
        return TenantConfig(name, secret, **own)

    tenants = (tenant("a", of_a or {}), tenant("b", {}))
    own = LimitsConfig(max_tokens=1 << 12, **limits)
    config, clock = serve_config(folder, limits=own, tenants=tenants), Clock()
    with ServedDaemon(config, cache=None, clock=clock) as served:
        yield House(served, clock)


def match(wire: Wire) -> pb.MatchRequest:
    return pb.MatchRequest(session=wire.head, namespace_id=wire.namespace_id, tokens=PROMPT)


def acquire(wire: Wire, request_id: bytes = b"r", **changes: Any) -> pb.AcquireRequest:
    values = {"namespace_id": wire.namespace_id, "tokens": PROMPT, **changes}
    return pb.AcquireRequest(session=wire.head, request_id=request_id, **values)


def flood(wire: Wire, calls: int) -> Counter[str]:
    return Counter(status(wire, "Match", match(wire)) for _ in range(calls))


def test_one_tenant_s_flood_is_its_own(tmp_path: Path) -> None:
    with house(tmp_path, {"max_calls_per_s": 10}) as at, at.session("a") as a, at.session("b") as b:
        found: Counter[str] = Counter()
        for _ in range(9):  # each has opened a namespace
            found += flood(a, 50)
            assert flood(b, 1) == {"OK": 1}
        assert found == {"OK": 9, "RESOURCE_EXHAUSTED": 441}
        assert a.refusal("Match", match(a)) == (
            "RESOURCE_EXHAUSTED",
            "limits.max_calls_per_s = 10: tenant 'a' has had them: again in 0.1 s",
        )
        assert at.counters("rate_limited") == {
            "rate_limited_calls_total{limit=max_calls_per_s,tenant=a}": 442
        }
        assert at.counters("tenant_calls") == {
            "tenant_calls_total{tenant=a}": 10,
            "tenant_calls_total{tenant=b}": 10,
        }
        at.clock.now += 0.5
        assert flood(a, 50)["OK"] == 5
        at.clock.now += 20  # what wasn't used is not saved up
        assert flood(a, 50)["OK"] == 10
        assert flood(b, 50)["OK"] == 10


def limited(wire: Wire) -> dict[str, list[Any]]:
    """Of each rpc of a session, those that take of a tenant's calls: whatever they are."""
    head, number = wire.head, wire.namespace_id
    at = {"session": head, "namespace_id": number, "tokens": PROMPT}
    commit = pb.LeaseCommit(request_id=b"pool", tokens=u32(*range(16)), pages=pages(u32(0)))
    written = pb.LeaseCommit(request_id=b"arena", tokens=u32(*range(16)))
    return {
        "OpenNamespace": [
            pb.OpenNamespaceRequest(session=head, identity=identity().encode(), tenant="a")
        ],
        "Match": [match(wire), pb.MatchRequest(session=head, namespace_id=number)],
        "Acquire": [acquire(wire), acquire(wire, b"")],
        "Grant": [pb.GrantRequest(session=head, grants=grants(1)), pb.GrantRequest(session=head)],
        "Commit": [
            pb.CommitRequest(session=head, leases=[commit]),
            pb.CommitRequest(session=head, grants=grants(1)),
        ],
        "Release": [
            pb.ReleaseRequest(session=head, request_ids=[b"unheard of"]),
            pb.ReleaseRequest(session=head, grants=grants(1)),
        ],
        "Read": [pb.ReadRequest(session=head, request_id=b"arena")],
        "Write": [pb.WriteRequest(session=head, commit=written)],
        "Explain": [pb.ExplainRequest(**at), pb.ExplainRequest(session=head, request_id=b"arena")],
        "Pin": [pb.PinRequest(**at)],
        "Unpin": [pb.UnpinRequest(**at)],
        "Prefetch": [pb.PrefetchRequest(**at)],
        "Invalidate": [pb.InvalidateRequest(session=head, namespace_id=number)],
    }


def test_each_rpc_of_a_session_takes_of_its_tenant_s_calls(tmp_path: Path) -> None:
    with house(tmp_path, {"max_calls_per_s": 10}) as at, at.session("a") as wire:
        wire.call("Acquire", acquire(wire, b"pool"))
        wire.call("Acquire", acquire(wire, b"arena", place=1))
        flood(wire, 10)
        requests = limited(wire)
        assert set(requests) == {rpc for rpc, whose in WHOSE.items() if "session" in whose}
        for rpc, several in requests.items():
            found = [status(wire, rpc, each) for each in several]
            assert found == ["RESOURCE_EXHAUSTED"] * len(several), rpc
        # what lets go of something is never refused, nor an operator
        released = pb.ReleaseRequest(session=wire.head, request_ids=[b"pool"])
        assert status(wire, "Release", released) == "OK"
        released = pb.ReleaseRequest(session=wire.head, request_ids=[b"arena", b"unheard of"])
        assert status(wire, "Release", released) == "OK"
        assert status(wire, "Release", released) == "RESOURCE_EXHAUSTED"
        for rpc, whose in WHOSE.items():
            if whose == "administrator" and rpc != "Drain":
                assert status(wire, rpc) in ("OK", "NOT_FOUND", "INVALID_ARGUMENT")
        assert status(wire, "Explain", pb.ExplainRequest(tokens=PROMPT)) == "OK"  # of the only one


def test_bytes_are_those_of_payloads(tmp_path: Path) -> None:
    """Of Commit, Write and Read; what a call takes more than there is delays the next ones."""
    limits = {"max_mb_per_s": 2.5 * PAGE_BYTES / 1e6}
    told = f"limits.max_mb_per_s = {limits['max_mb_per_s']}: tenant 'a' has had them"
    with house(tmp_path, limits) as at, at.session("a") as a, at.session("b") as b:
        for wire in (a, b):
            wire.call("Acquire", acquire(wire, b"arena", place=1))

        def commit(wire: Wire, request_id: bytes, blocks: int) -> str:
            own = u32(*(1000 * int(request_id) + each for each in range(PAGE_SIZE * blocks)))
            wire.call("Acquire", acquire(wire, request_id, tokens=own))
            grant = pb.GrantRequest(session=wire.head, grants=grants(blocks))
            page_ids = granted(wire.call("Grant", grant))
            lease = pb.LeaseCommit(request_id=request_id, tokens=own, pages=pages(page_ids))
            return status(wire, "Commit", pb.CommitRequest(session=wire.head, leases=[lease]))

        assert commit(a, b"1", 2) == "OK"  # half a page's bytes are left
        assert commit(a, b"2", 4) == "OK"  # 3.5 are owed
        assert commit(a, b"3", 1) == "RESOURCE_EXHAUSTED"
        assert at.counters("tenant_payload_bytes") == {
            "tenant_payload_bytes_total{tenant=a}": 6 * PAGE_BYTES
        }
        assert flood(a, 20) == {"OK": 20}  # what brings no bytes goes on
        written = pb.LeaseCommit(request_id=b"arena", tokens=u32(*range(16)))
        write = pb.WriteRequest(session=a.head, commit=written)
        code, words = a.refusal("Write", write)
        assert (code, words.startswith(told)) == ("RESOURCE_EXHAUSTED", True), words
        assert commit(b, b"1", 2) == "OK"
        at.clock.now += 1.39
        assert commit(a, b"3", 1) == "RESOURCE_EXHAUSTED"
        at.clock.now += 0.02
        assert commit(a, b"3", 1) == "OK"


def test_a_stream_pays_for_all_of_its_blocks(tmp_path: Path) -> None:
    blocks, payload_bytes = 4, 2048
    limits = {"max_mb_per_s": 3 * payload_bytes / 1e6}
    with house(tmp_path, limits) as at, Remote(at.served.address, payload_bytes) as one:
        assert one.store(0, blocks) == [_core.ADOPTED] * blocks  # one more than there are
        with pytest.raises(RateLimited, match=r"max_mb_per_s = .* tenant 'default'"):
            one.store(1, blocks)
        at.clock.now += 1.0
        one.lease(b"r", 0, blocks)
        rows = one.rows(blocks)
        assert one.streams.read(b"r", rows).size == blocks
        with pytest.raises(RateLimited, match="max_mb_per_s"):
            one.streams.read(b"r", rows, blocks=1)
        one.client.release([b"r"])
        assert at.counters("tenant_payload_bytes") == {
            "tenant_payload_bytes_total{tenant=default}": 2 * blocks * payload_bytes
        }


def test_a_commit_of_several_tenants_keeps_those_that_may(tmp_path: Path) -> None:
    """An engine commits for all of its callers in one call."""
    with house(tmp_path, {"max_calls_per_s": 8}) as at, at.session() as wire:
        leases = []
        for tenant in ("a", "b", "a"):
            wire.open_namespace(tenant=tenant)
            request_id = b"%s %d" % (tenant.encode(), len(leases))
            answer = wire.call("Acquire", acquire(wire, request_id, grants=grants(1)))
            lease = pb.LeaseCommit(request_id=request_id, tokens=u32(*range(PAGE_SIZE)))
            lease.pages.extend(pages(granted(answer)))
            leases.append(lease)
        wire.open_namespace(tenant="a")
        assert flood(wire, 20)["OK"] == 3
        commit = pb.CommitRequest(session=wire.head, leases=leases)
        results = [list(each) for each in wire.call("Commit", commit).results]
        assert results == [[_core.REFUSED], [_core.ADOPTED], [_core.REFUSED]]
        assert at.counters("rate_limited") == {
            "rate_limited_calls_total{limit=max_calls_per_s,tenant=a}": 18
        }
        of_a = pb.CommitRequest(session=wire.head, leases=[leases[0]])
        code, words = wire.refusal("Commit", of_a)
        assert (code, "tenant 'a' has had them" in words) == ("RESOURCE_EXHAUSTED", True)
        at.clock.now += 1.0  # the page is the engine's still
        assert list(wire.call("Commit", of_a).results[0]) == [_core.ADOPTED]


def test_a_tenant_s_own_limit_goes_before_that_of_all(tmp_path: Path) -> None:
    limits, own = {"max_calls_per_s": 4}, {"max_calls_per_s": 2}
    with house(tmp_path, limits, own) as at, at.session("a") as a, at.session("b") as b:
        assert (flood(a, 9)["OK"], flood(b, 9)["OK"]) == (1, 3)
        assert a.refusal("Match", match(a))[1].startswith("tenants.max_calls_per_s = 2: tenant 'a'")


@pytest.mark.parametrize(
    ("limits", "own"), [({}, {}), ({"max_calls_per_s": 1}, {"max_calls_per_s": 0})]
)
def test_without_a_limit_there_is_none(
    tmp_path: Path, limits: dict[str, Any], own: dict[str, Any]
) -> None:
    with house(tmp_path, limits, own) as at, at.session("a") as wire:
        assert flood(wire, 300) == {"OK": 300}
        assert at.counters("tenant_calls") == {"tenant_calls_total{tenant=a}": 301}
        assert at.counters("rate_limited") == {}


def test_a_client_is_told_when_to_come_back(tmp_path: Path) -> None:
    with house(tmp_path, {"max_calls_per_s": 4}) as at, TinyEngine(at.served.address) as engine:
        handle = engine.client.open_namespace(identity().encode())
        for _ in range(3):
            engine.client.match(handle, TOKENS)
        for part, works in ((0.9, False), (0.11, True)):
            with pytest.raises(RateLimited, match=r"max_calls_per_s = 4: tenant 'default'") as told:
                engine.client.match(handle, TOKENS)
            if not works:
                first_s = told.value.retry_s
                assert 0.249 < first_s < 0.252
            at.clock.now += part * first_s
        engine.client.match(handle, TOKENS)


@pytest.mark.parametrize("shown", ["certificates", "tokens in clear"])
def test_calls_without_a_session_are_their_credential_s_tenant_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Any
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    at = Callers(tmp_path, shown, limits=LimitsConfig(max_calls_per_s=3))
    with ServedDaemon(at.config, cache=None, clock=at.clock) as at.served, at.wire("a") as wire:
        wire.open(tenant="a")
        asked = pb.PinRequest(namespace=at.name_of("a"), tokens=PROMPT)
        with at.wire("a") as other, at.wire(OPERATOR) as operator, at.wire("b") as theirs:
            found = [status(other, "Pin", asked) for _ in range(4)]
            assert found == ["OK", "OK", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]
            unknown = pb.ExplainRequest(request_id=b"unheard of")
            assert status(other, "Explain", unknown) == "RESOURCE_EXHAUSTED"
            assert status(theirs, "Explain", unknown) == "NOT_FOUND"
            for _ in range(9):
                assert status(operator, "Pin", asked) == "OK"
                assert status(operator, "Stats") == "OK"


@pytest.mark.parametrize("seed", range(20))
def test_no_window_has_more_than_its_rate_and_a_second_s_worth(seed: int) -> None:
    """Whatever comes when: and a caller that comes when it is told to is taken."""
    dice = random.Random(seed)
    rate, now, taken = dice.choice([0.5, 1, 7, 1000]), 0.0, []
    bucket = Bucket(rate, now)
    for _ in range(2000):
        now += dice.choice([0.0, 0.0, dice.expovariate(rate), dice.expovariate(rate / 20)])
        wait_s = bucket.wait_s(now)
        if wait_s and dice.random() < 0.2:
            now += wait_s
            wait_s = bucket.wait_s(now)
            assert not wait_s
        if not wait_s:
            bucket.take(1)
            taken.append(now)
    times = np.array(taken)
    for _ in range(500):
        first, last = sorted(dice.sample(range(len(times)), 2))
        most = rate * (times[last] - times[first]) + max(rate, 1.0)
        assert last - first + 1 <= most + 1e-3


def test_a_large_take_is_paid_back_before_the_next() -> None:
    bucket = Bucket(100.0, 0.0)
    assert bucket.wait_s(0.0) == 0.0
    bucket.take(1000.0)
    assert bucket.wait_s(0.0) == pytest.approx(9.01)
    assert bucket.wait_s(9.0) == pytest.approx(0.01)
    assert bucket.wait_s(9.02) == 0.0
    assert Bucket(0.0, 0.0).wait_s(5.0) == 0.0

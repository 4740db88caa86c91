"""Bearer tokens that are missing, wrong, another tenant's or rotated away: at each rpc of the
descriptors; and files of tokens that can't be used. Not here: what a known one may do
(test_credentials.py)."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from kvc2 import keyring
from kvc2.errors import InvalidConfig
from kvc2.keyring import LOOK_S, KeyringFile
from kvc2.metrics import Metrics
from kvc2.server.callers import WHOSE
from kvc2.server.credentials import TOKENS_MAX, Credentials, token_source
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.callers import (
    OPERATOR,
    Callers,
    Clock,
    request_of,
    rpcs,
    served_callers,
    status,
)
from tests.doubles.certificates import replace
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.wires import Wire, status_of

UNARY = sorted(WHOSE.keys() - {"Attach"})  # streams are as these on the wire
GOOD = "a" * 16
# what a call shows, and what it is told
IN_VAIN = {
    "nothing": ((), "Bearer TOKEN, which each call needs here"),
    "empty": (("",), "Bearer TOKEN, once, one of token_file"),
    "no token": (("Bearer ",), "Bearer TOKEN, once, one of token_file"),
    "another scheme": (("Basic {a}",), "Bearer TOKEN, once, one of token_file"),
    "no scheme": (("{a}",), "Bearer TOKEN, once, one of token_file"),
    "its beginning": (("Bearer {a:.10}",), "Bearer TOKEN, once, one of token_file"),
    "more than it": (("Bearer {a}x",), "Bearer TOKEN, once, one of token_file"),
    "two": (("Bearer {a}", "Bearer {b}"), "Bearer TOKEN, once, one of token_file"),
}


@pytest.fixture(scope="module", params=["tokens over TLS", "tokens in clear"])
def callers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callers]:
    folder = tmp_path_factory.mktemp("daemon")
    with served_callers(folder, request.param, on_clock=True) as found:
        yield found


@pytest.fixture
def rotates(callers: Callers) -> Iterator[Callable[[dict[str, str]], None]]:
    """Puts other tokens into the file, and lets its time come; the first are there afterwards."""

    def rotate(tokens: dict[str, str]) -> None:
        callers.write_tokens(tokens)
        callers.clock.now += LOOK_S

    yield rotate
    rotate(callers.tokens)


def refusal(wire: Wire, rpc: str) -> tuple[str, str]:
    if rpc != "Attach":
        return wire.refusal(rpc, request_of(rpc))
    with pytest.raises(grpc.RpcError) as caught:
        wire.attach()
    return status_of(caught.value)


@pytest.mark.parametrize("rpc", sorted(WHOSE))
def test_who_shows_no_known_token_may_call_nothing(callers: Callers, rpc: str) -> None:
    assert rpc in rpcs()
    for values, told in IN_VAIN.values():
        with callers.wire("a") as wire:
            wire.headers = tuple(
                ("authorization", each.format(**callers.tokens)) for each in values
            )
            assert refusal(wire, rpc) == ("UNAUTHENTICATED", f"authorization: {told}")


@pytest.mark.parametrize("rpc", UNARY)
def test_a_token_that_is_gone_opens_nothing_more_and_its_heir_all(
    callers: Callers, rotates: Callable[[dict[str, str]], None], rpc: str
) -> None:
    """Also for a connection, and a session, that began with it."""
    with callers.wire("a") as wire, callers.wire(OPERATOR) as operator:
        wire.open(tenant="a")
        before = {each: status(each, rpc) for each in (wire, operator) if rpc != "Drain"}
        rotates({OPERATOR: callers.tokens[OPERATOR], "a": "a-fresh-token-of-a"})
        assert status(wire, rpc) == "UNAUTHENTICATED"
        if rpc != "Drain":
            assert status(operator, rpc) == before[operator]
            wire.headers = (("authorization", "Bearer a-fresh-token-of-a"),)
            assert status(wire, rpc) == before[wire]
            # the session is the tenant's, whichever of its tokens it began with
            wire.call("Grant", pb.GrantRequest(session=wire.head))


@pytest.mark.parametrize("rpc", sorted(each for each in WHOSE if "session" in WHOSE[each]))
def test_a_token_of_another_tenant_opens_no_session_of_ours(callers: Callers, rpc: str) -> None:
    with callers.wire("a") as ours, callers.wire("b") as theirs:
        ours.open(tenant="a")
        values = {"session": ours.head}
        if rpc == "Invalidate":
            values["namespace_id"] = ours.namespace_id
        request = getattr(pb, f"{rpc}Request")(**values)
        assert theirs.refusal(rpc, request) == (
            "PERMISSION_DENIED",
            "owner of the bearer token = 'b': the one that the session began with",
        )


def test_several_tokens_of_one_tenant_count_at_a_time(
    callers: Callers, rotates: Callable[[dict[str, str]], None]
) -> None:
    text = f"{callers.tokens['a']}: a\n{GOOD}: a\n"
    replace(callers.token_file, text.encode())
    callers.clock.now += LOOK_S
    for token in (callers.tokens["a"], GOOD):
        with callers.wire("a") as wire:
            wire.headers = (("authorization", f"Bearer {token}"),)
            wire.open(tenant="a")


def test_the_file_is_looked_at_once_a_second(callers: Callers) -> None:
    with callers.wire("b") as wire:
        callers.clock.now += LOOK_S
        assert status(wire, "Grant") == "FAILED_PRECONDITION"
        callers.write_tokens({"a": GOOD})
        assert status(wire, "Grant") == "FAILED_PRECONDITION"  # known, and without a session
        callers.clock.now += LOOK_S
        assert status(wire, "Grant") == "UNAUTHENTICATED"
        callers.write_tokens(callers.tokens)
        callers.clock.now += LOOK_S
        assert status(wire, "Grant") == "FAILED_PRECONDITION"


def test_a_changed_file_that_can_t_be_used_keeps_the_tokens(callers: Callers) -> None:
    assert callers.served is not None
    counters = callers.served.daemon.metrics.values
    kind = "faults_total{kind=token_file_refused}"
    try:
        with callers.wire("a") as wire:
            for spoil in (
                lambda: callers.token_file.write_text("tok: [\n"),
                lambda: callers.token_file.chmod(0o644),
                lambda: callers.token_file.unlink(),
            ):
                before = counters()[kind]
                spoil()
                for _ in range(3):
                    callers.clock.now += LOOK_S
                    assert status(wire, "Grant") == "FAILED_PRECONDITION"
                assert counters()[kind] == before + 1
    finally:
        callers.write_tokens(callers.tokens)
        callers.clock.now += LOOK_S


def test_with_a_client_ca_too_both_are_known_and_a_token_counts_first(tmp_path: Path) -> None:
    """gRPC's Python can't ask for a certificate without needing one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        found = Callers(tmp_path, "certificates", token_file=tmp_path / "tokens.yaml")
        found.write_tokens(found.tokens)
        with ServedDaemon(found.config, cache=None) as found.served, found.wire("a") as wire:
            wire.open(tenant="a")
            assert status(wire, "Stats") == "PERMISSION_DENIED"
            wire.headers = (("authorization", f"Bearer {found.tokens[OPERATOR]}"),)
            assert status(wire, "Stats") == "OK"
            wire.headers = (("authorization", "Bearer no-such-token-at-all"),)
            assert status(wire, "Stats") == "UNAUTHENTICATED"
            assert status(wire, "Grant") == "UNAUTHENTICATED"  # nor is it tenant a's


# The file


def tokens_of(path: Path) -> KeyringFile:
    return KeyringFile(token_source(path, frozenset({"a", "default", "administrator"}), Metrics()))


SHORT, LONG = "a" * 15, "a" * 513


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", "holds nothing, so that nobody could call"),
        ("- a\n", "a mapping of names to values"),
        (f"{GOOD}: 5\n", "a mapping to owners' names, both as strings"),
        (f"{SHORT}: a\n", "entry 1 has another"),
        (f"{GOOD}: a\n{LONG}: a\n", "entry 2 has another"),
        (f"'{GOOD} b': a\n", "entry 1 has another"),
        (f"a: {GOOD}\n", "entry 1 has another"),
        (f"{GOOD}: tenant-that-is-not\n", "entry 1 has another"),
        (f"{GOOD}: [\n", "YAML: line 2, column 1"),
        (f"{GOOD}: *{GOOD}\n", "YAML: line 1"),
        (f"{GOOD}: !{GOOD} a\n", "YAML: line 1"),
        ("".join(f"{GOOD}{each}: a\n" for each in range(TOKENS_MAX + 1)), "at most 1000 tokens"),
    ],
)
def test_a_file_that_can_t_be_used_is_named_and_not_quoted(
    tmp_path: Path, text: str, allowed: str
) -> None:
    path = tmp_path / "t.yaml"
    replace(path, text.encode())
    with pytest.raises(InvalidConfig) as caught:
        tokens_of(path)
    assert caught.value.field == "token_file"
    assert allowed in str(caught.value)
    assert SHORT not in str(caught.value)
    assert "tenant-that-is-not" not in str(caught.value)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    replace(path, f"{GOOD}: a\n".encode())
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(InvalidConfig, match=r"^token_file = .*: mode 0600: others may read it"):
            tokens_of(path)


def test_the_daemon_doesn_t_start_with_one(tmp_path: Path) -> None:
    config = serve_config(tmp_path, listen="127.0.0.1:0", token_file=tmp_path / "none.yaml")
    with pytest.raises(InvalidConfig, match=r"^token_file = .*: a readable file"):
        Credentials.of_config(config, Metrics())


def test_every_token_is_compared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is shown: as many comparisons, of as many bytes, each in constant time."""
    path = tmp_path / "t.yaml"
    replace(path, "".join(f"{GOOD}{each}: a\n" for each in range(50)).encode())
    tokens = tokens_of(path)
    seen: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    class Compared:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(keyring, "hmac", Compared)
    for shown, owner in ((f"{GOOD}0", "a"), (f"{GOOD}49", "a"), ("", None), ("x" * 10_000, None)):
        assert tokens.owner(shown) == owner
        assert seen == [(32, 32)] * 50
        seen.clear()


def test_neither_log_nor_memory_shows_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path, clock = tmp_path / "t.yaml", Clock()
    replace(path, f"{GOOD}: a\n".encode())
    source = token_source(path, frozenset({"a"}), Metrics())
    tokens = KeyringFile(source, clock)
    for text in (f"{GOOD}x: a\n", f"{GOOD}: b\n", f"{GOOD}\n"):
        replace(path, text.encode())
        clock.now += LOOK_S
        tokens.owner(GOOD)
    assert GOOD not in caplog.text
    assert GOOD not in repr(vars(tokens))

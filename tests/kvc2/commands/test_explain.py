"""Explain over the wire and the real cache: each cause, in the words of the answer; who may ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvc2 import errors
from kvc2.client import Admin, Media
from kvc2.commands import cli, prompts
from kvc2.config import LimitsConfig, TenantConfig
from kvc2.foreign_identity import Foreign
from kvc2.v1 import cache_pb2 as pb
from tests.doubles.byte_tokenizer import add_tokenizer
from tests.doubles.daemons import ServedDaemon, serve_config
from tests.doubles.engines import PAGE_SIZE, identity
from tests.doubles.wires import Wire, granted, grants, pages, u32

BLOCKS = 4
TOKENS = list(range(BLOCKS * PAGE_SIZE + 1))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    secret = tmp_path / "other.secret"
    secret.write_bytes(bytes(32))
    secret.chmod(0o600)
    tenants = (TenantConfig("other", secret),)
    with ServedDaemon(serve_config(tmp_path, tenants=tenants), cache=None) as daemon:
        yield daemon


@pytest.fixture
def wire(served: ServedDaemon) -> Iterator[Wire]:
    with Wire(served.address) as opened:
        yield opened.open()


def opened(wire: Wire, tenant: str = "", salt: bytes = b"", **changes: Any) -> int:
    request = pb.OpenNamespaceRequest(
        session=wire.head, identity=identity(**changes).encode(), tenant=tenant, salt=salt
    )
    return int(wire.call("OpenNamespace", request).namespace_id)


def compute(wire: Wire, tokens: list[int], number: int | None = None) -> None:
    """A request that leaves what it computed."""
    number = wire.namespace_id if number is None else number
    request_id = b"of %d" % number
    blocks = len(tokens) // PAGE_SIZE
    acquire = pb.AcquireRequest(
        session=wire.head, namespace_id=number, request_id=request_id, tokens=u32(*tokens),
        grants=grants(blocks),
    )  # fmt: skip
    found = wire.call("Acquire", acquire)
    held = found.matched_tokens // PAGE_SIZE
    part = pb.LeaseCommit(
        request_id=request_id, first_block=held,
        tokens=u32(*tokens[held * PAGE_SIZE : blocks * PAGE_SIZE]),
        pages=pages(granted(found)[: 4 * (blocks - held)]),
    )  # fmt: skip
    wire.call("Commit", pb.CommitRequest(session=wire.head, leases=[part]))
    wire.call("Release", pb.ReleaseRequest(session=wire.head, request_ids=[request_id]))


def explain(wire: Wire, tokens: list[int], number: int | None = None) -> pb.ExplainResponse:
    number = wire.namespace_id if number is None else number
    request = pb.ExplainRequest(session=wire.head, namespace_id=number, tokens=u32(*tokens))
    answer = wire.call("Explain", request)
    assert isinstance(answer, pb.ExplainResponse)
    return answer


def evict_all(wire: Wire) -> None:
    wire.call("Flush", pb.FlushRequest(deadline_ms=5000))
    for tier in ("cpu", "gpu"):
        wire.call("Evict", pb.EvictRequest(tier=tier))


def test_a_hit_and_what_was_never_seen(wire: Wire) -> None:
    assert explain(wire, TOKENS).why == "never_seen"
    compute(wire, TOKENS)
    found = explain(wire, TOKENS)
    assert (found.why, found.hit_blocks, found.page_size) == ("nothing", BLOCKS, PAGE_SIZE)
    assert [(run.tier, run.blocks) for run in found.runs] == [("gpu", BLOCKS)]


def test_where_a_prompt_parts_from_a_sibling(wire: Wire) -> None:
    compute(wire, TOKENS)
    found = explain(wire, [*TOKENS[: PAGE_SIZE + 3], *[9999] * PAGE_SIZE])
    assert (found.why, found.hit_blocks, found.sibling_equal) == ("diverged", 1, 3)
    assert found.sibling == u32(*TOKENS[PAGE_SIZE : 2 * PAGE_SIZE])


def test_what_was_evicted_names_tier_policy_and_age(wire: Wire) -> None:
    compute(wire, TOKENS)
    evict_all(wire)
    found = explain(wire, TOKENS)
    assert (found.why, found.hit_blocks, found.policy) == ("evicted", 0, "hazard")
    assert found.tier in ("gpu", "cpu")
    assert 0 <= found.died_s_ago <= found.uptime_s


def test_what_was_invalidated_says_so_until_it_is_forgotten(wire: Wire) -> None:
    compute(wire, TOKENS)
    wire.call("Invalidate", pb.InvalidateRequest(session=wire.head, namespace_id=wire.namespace_id))
    assert explain(wire, TOKENS).why == "invalidated"


def test_another_identity_of_the_tenant_that_has_it_is_named(wire: Wire) -> None:
    compute(wire, TOKENS)
    other = opened(wire, rope_theta=5.0)
    found = explain(wire, TOKENS, other)
    assert (found.why, found.other.hit_tokens) == ("other_namespace", BLOCKS * PAGE_SIZE)
    assert [field.name for field in found.other.fields] == ["rope_theta"]
    assert found.other.fields[0].ours == "5.0"


def test_a_field_of_another_engines_identity_that_differs_is_named(wire: Wire) -> None:
    numbers = []
    for eager in (1, True):
        known = Foreign("vllm", "a", {"page_size": PAGE_SIZE, "eager": eager})
        request = pb.OpenNamespaceRequest(session=wire.head, identity=known.encode())
        numbers.append(int(wire.call("OpenNamespace", request).namespace_id))
    compute(wire, TOKENS, numbers[0])
    found = explain(wire, TOKENS, numbers[1])
    assert [field.name for field in found.other.fields] == ["fields.eager"]
    assert (found.other.fields[0].ours, found.other.fields[0].theirs) == ("True", "1")


@pytest.mark.parametrize("whose", [{"tenant": "other"}, {"salt": b"s"}])
def test_what_another_tenant_or_salt_has_is_told_to_nobody(wire: Wire, whose: Any) -> None:
    compute(wire, TOKENS)
    stranger = opened(wire, rope_theta=5.0, **whose)
    for tokens in (TOKENS, [*TOKENS[:3], *[9999] * PAGE_SIZE]):
        found = explain(wire, tokens, stranger)
        assert (found.why, found.sibling) == ("never_seen", b"")
        assert not found.HasField("other")
        assert found.dead_known == 0


def test_a_request_is_explained_as_its_acquire_found_it(served: ServedDaemon, wire: Wire) -> None:
    compute(wire, TOKENS)
    request_id = b"of %d" % wire.namespace_id
    found = wire.call("Explain", pb.ExplainRequest(session=wire.head, request_id=request_id))
    assert (found.why, found.hit_blocks, found.tokens) == ("never_seen", 0, len(TOKENS))
    with Wire(served.address) as second:
        second.open()
        request = pb.ExplainRequest(session=second.head, request_id=request_id)
        assert second.refusal("Explain", request)[0] == "NOT_FOUND"
    with Admin(served.address) as admin:
        assert admin.explain(request_id=request_id).why == "never_seen"


def test_the_owner_sees_every_session_and_names_the_namespace(
    served: ServedDaemon, wire: Wire
) -> None:
    compute(wire, TOKENS)
    tokens = np.array(TOKENS, np.uint32)
    with Admin(served.address) as admin:
        found = admin.explain(tokens=tokens)
        assert (found.why, found.runs) == ("nothing", (("gpu", BLOCKS),))
        opened(wire, rope_theta=5.0)
        with pytest.raises(errors.NotFound, match=found.namespace):
            admin.explain(tokens=tokens)
        named = admin.explain(tokens=tokens, namespace=bytes.fromhex(found.namespace))
        assert named.why == "nothing"
        with pytest.raises(errors.NotFound, match="namespace"):
            admin.explain(tokens=tokens, namespace=bytes(32))


def test_tcp_tells_nobody_without_a_session(tmp_path: Path) -> None:
    config = serve_config(tmp_path, listen="127.0.0.1:0")
    with ServedDaemon(config, cache=None) as served:
        address = f"127.0.0.1:{served.daemon.port}"
        with Admin(address) as admin, pytest.raises(errors.Denied, match="session"):
            admin.explain(request_id=b"r")


def test_after_a_restart_nothing_is_known_of_the_dead(tmp_path: Path) -> None:
    for why in ("evicted", "never_seen"):
        config = serve_config(tmp_path)
        with ServedDaemon(config, cache=None) as served, Wire(served.address) as wire:
            wire.open()
            if why == "evicted":
                compute(wire, TOKENS)
                evict_all(wire)
            found = explain(wire, TOKENS)
            assert found.why == why
            assert found.uptime_s > 0


def test_a_daemon_that_may_remember_none_says_how_many_are_forgotten(tmp_path: Path) -> None:
    config = serve_config(tmp_path, limits=LimitsConfig(max_dead_blocks=0))
    with ServedDaemon(config, cache=None) as served, Wire(served.address) as wire:
        wire.open()
        compute(wire, TOKENS)
        evict_all(wire)
        found = explain(wire, TOKENS)
        assert (found.why, found.dead_forgotten) == ("never_seen", BLOCKS)


def test_the_command_reads_files_and_prints_why(served: ServedDaemon, wire: Wire) -> None:
    compute(wire, TOKENS)
    folder = Path(served.config.listen.removeprefix("unix:")).parent
    file = folder / "tokens"
    file.write_text(json.dumps([*TOKENS[: PAGE_SIZE + 3], *[9999] * PAGE_SIZE]))
    at = ["--address", served.address]
    found = CliRunner().invoke(cli.app, ["explain", "--tokens", str(file), *at])
    assert found.exit_code == 0, found.output
    assert "blocks 0 to 0: gpu" in found.output
    assert f"parts from it at token {PAGE_SIZE + 3}" in found.output
    assert "prompt: 9999" in found.output
    found = CliRunner().invoke(cli.app, ["explain", "--tokens", str(file), "--json", *at])
    assert json.loads(found.stdout)["sibling_equal"] == 3
    found = CliRunner().invoke(cli.app, ["explain", f"of {wire.namespace_id}", *at])
    assert "never seen since the daemon's start" in found.output
    assert CliRunner().invoke(cli.app, ["explain", "nobody", *at]).exit_code == 1
    file.write_text("not tokens")
    for wrong in (["--tokens", str(file)], [], ["r", "--tokens", str(file)], ["--text", str(file)]):
        assert CliRunner().invoke(cli.app, ["explain", *wrong, *at]).exit_code == 2


def test_token_files_are_json_or_numbers(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    for text in ("[1, 2, 3]", "1 2\n3", "1,2,3"):
        file.write_text(text)
        assert prompts.read_tokens(file).tokens.tolist() == [1, 2, 3]
    extra = {"first_token": 1, "num_tokens": 2, "digest": "ab" * 32}
    file.write_text(json.dumps({"tokens": [1, 2, 3], "extras": [extra]}))
    assert prompts.read_tokens(file).extras == [Media(1, 2, b"\xab" * 32)]
    for wrong in (
        {"tokens": [1], "images": []},
        {"extras": []},
        {"tokens": [1], "extras": [{}]},
        {"tokens": [1], "extras": [7]},
        {"tokens": [1], "extras": [extra | {"first_token": "x"}]},
        {"tokens": [1], "extras": [extra | {"num_tokens": -1}]},
        {"tokens": [1], "extras": [extra | {"name": "cat"}]},
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(errors.InvalidRequest, match="tokens"):
            prompts.read_tokens(file)


def test_a_text_and_a_tokenizer_say_where_a_prompt_parts_in_words(
    served: ServedDaemon, wire: Wire, tmp_path: Path
) -> None:
    """From a text file to its tokens, through the daemon, and back to text."""
    folder = add_tokenizer(tmp_path)
    cached = "You are a careful helper. " * 4  # a byte is a token here
    asked = cached[:41] + "CURIOUS" + cached[48:]
    tokens = [int(token) for token in prompts.open_tokenizer(folder).encode(cached).ids]
    assert len(tokens) == len(cached)
    compute(wire, tokens)
    (tmp_path / "prompt.txt").write_text(asked)
    arguments = ["explain", "--text", str(tmp_path / "prompt.txt"), "--address", served.address]
    found = CliRunner().invoke(cli.app, [*arguments, "--tokenizer", str(folder)])
    assert found.exit_code == 0, found.output
    assert f"2 of {(len(asked) - 1) // PAGE_SIZE} full blocks of 16 tokens hit" in found.stdout
    assert "parts from it at token 41" in found.stdout
    assert f"cached: {cached[41:48]!r}" in found.stdout
    assert f"prompt: {asked[41:48]!r}" in found.stdout
    (tmp_path / "prompt.txt").write_text(cached)
    found = CliRunner().invoke(cli.app, [*arguments, "--tokenizer", str(folder), "--json"])
    assert json.loads(found.stdout)["hit_blocks"] == len(cached) // PAGE_SIZE


def test_a_text_needs_a_tokenizer_that_can_be_read(served: ServedDaemon, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello")
    arguments = ["explain", "--text", str(tmp_path / "prompt.txt"), "--address", served.address]
    for more, words in (
        ([], "given with --text"),
        (["--tokenizer", str(tmp_path)], "a folder with tokenizer.json"),
    ):
        found = CliRunner().invoke(cli.app, [*arguments, *more])
        assert found.exit_code == 2
        assert words in found.output

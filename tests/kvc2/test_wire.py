"""Plain values and messages: nothing is lost on the way, and each message has its value."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc2 import answers
from kvc2.client.asking import lease_commit
from kvc2.v1 import cache_pb2
from kvc2.wire import from_message, packed, to_message, unpacked

KINDS: dict[type, Any] = {
    answers.Hints: cache_pb2.Hints,
    answers.TierTokens: cache_pb2.TierTokens,
    answers.Matched: cache_pb2.MatchResponse,
    answers.Acquired: cache_pb2.AcquireResponse,
    answers.Committed: cache_pb2.CommitResponse,
    answers.Released: cache_pb2.ReleaseResponse,
    answers.Explained: cache_pb2.ExplainResponse,
    answers.Flushed: cache_pb2.FlushResponse,
    answers.Evicted: cache_pb2.EvictResponse,
    answers.TenantUse: cache_pb2.TenantUse,
    answers.PrefixPinned: cache_pb2.PinResponse,
    answers.Prefetched: cache_pb2.PrefetchResponse,
    answers.Scrubbed: cache_pb2.ScrubResponse,
    answers.Invalidated: cache_pb2.InvalidateResponse,
    answers.DaemonStats: cache_pb2.StatsResponse,
}
HEXADECIMAL = {"namespace", "instance", "layout"}  # str of a value, bytes of its message
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(0, 2**32 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(st.characters(codec="utf-8"), max_size=8),
    bytes: st.binary(max_size=8),
}


def values_of(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Any value of this type, as the annotations of answers.py spell it."""
    inside, container = typing.get_args(hint), typing.get_origin(hint)
    if isinstance(hint, types.UnionType):
        return st.none() | values_of(inside[0])
    if container is np.ndarray:
        dtype = typing.get_args(inside[1])[0]
        most = np.iinfo(dtype).max
        return st.lists(st.integers(0, most), max_size=4).map(lambda row: np.array(row, dtype))
    if container is dict:
        return st.dictionaries(values_of(str), values_of(inside[1]), max_size=3)
    if container in (list, tuple):
        return st.lists(values_of(inside[0]), max_size=3).map(container)
    if hint is str and name in HEXADECIMAL:
        return st.binary(max_size=8).map(bytes.hex)
    if hint in SCALARS:
        return SCALARS[hint]
    fields = typing.get_type_hints(hint)
    return st.builds(hint, **{name: values_of(each, name) for name, each in fields.items()})


def plain(value: Any) -> Any:
    """Comparable with ==, arrays with their dtype."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if dataclasses.is_dataclass(value):
        names = [each.name for each in dataclasses.fields(value)]
        return type(value), {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return type(value), [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return type(value), value


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_value_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    value = data.draw(values_of(kind))
    sent = to_message(value, KINDS[kind]).SerializeToString(deterministic=True)
    back = from_message(kind, KINDS[kind].FromString(sent))
    assert plain(back) == plain(value)
    assert to_message(back, KINDS[kind]).SerializeToString(deterministic=True) == sent


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_has_the_fields_of_its_message_and_no_other(kind: type) -> None:
    names = {each.name for each in KINDS[kind].DESCRIPTOR.fields}
    assert set(typing.get_type_hints(kind)) == names


def test_an_answer_is_a_message_as_if_it_were_spelled_out() -> None:
    found = answers.Explained(
        page_size=16,
        tokens=40,
        hit_blocks=1,
        runs=(answers.TierBlocks("cpu", 1),),
        why="other_namespace",
        sibling=np.array([1, 70000], np.uint32),
        other=answers.OtherNamespace("00ff", 32, (answers.DifferingField("layers", "2", "4"),)),
        namespace="abcd",
    )
    assert to_message(found, cache_pb2.ExplainResponse) == cache_pb2.ExplainResponse(
        page_size=16,
        tokens=40,
        hit_blocks=1,
        runs=[cache_pb2.TierBlocks(tier="cpu", blocks=1)],
        why="other_namespace",
        sibling=b"\x01\0\0\0\x70\x11\x01\0",
        other=cache_pb2.OtherNamespace(
            namespace=b"\0\xff",
            hit_tokens=32,
            fields=[cache_pb2.DifferingField(name="layers", ours="2", theirs="4")],
        ),
        namespace=b"\xab\xcd",
    )
    alone = dataclasses.replace(found, other=None)
    assert not to_message(alone, cache_pb2.ExplainResponse).HasField("other")


def test_what_only_the_daemon_knows_stays_there() -> None:
    counts = answers.TierCounts("gpu", 4096, 4, free_pages=4, evicted=9, hit_rates=(0.5,))
    sent = cache_pb2.TierStats(tier="gpu", capacity_bytes=4096, pages=4, free_pages=4)
    assert to_message(counts, cache_pb2.TierStats) == sent


def test_arrays_of_other_integers_and_lists_go_as_u32() -> None:
    commit = answers.LeaseCommit(b"r", 0, [1, 2], np.array([3], np.int64))  # type: ignore[arg-type]
    sent = lease_commit(commit)
    assert sent.tokens == packed(np.array([1, 2]))
    assert [each.pages for each in sent.pages] == [b"\3\0\0\0"]
    assert unpacked(sent.tokens).tolist() == [1, 2]
    assert not unpacked(sent.tokens).flags.writeable

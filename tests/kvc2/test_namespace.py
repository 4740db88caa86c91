"""Identities: all that changes KV changes the namespace; nothing else does, nor an upgrade."""

from __future__ import annotations

import dataclasses
import hmac
import json
from dataclasses import MISSING
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvc2 import earlier_identity
from kvc2.cache.explain import differing
from kvc2.errors import InvalidRequest
from kvc2.foreign_identity import Foreign
from kvc2.identity import Identity, by_layer, canonical, formats_digest
from kvc2.layout import layer_major
from kvc2.namespace import check_layout, decode, fields_of, named_by, namespace, weights_of
from tests.doubles.engines import identity, layout

# One other valid value for every field of Identity.
CHANGES: dict[str, Any] = {
    "weights_digest": "cd" * 32,
    "architecture": "Qwen3MoeForCausalLM",
    "dtypes": (("attention", "bfloat16"), ("experts", "float32")),
    "kv_dtype": "bfloat16",
    "layers": 3,
    "kv_heads": 2,
    "head_size": 16,
    "rope_theta": 1e6,
    "page_size": 32,
    "rope_scaling": (("factor", "8"), ("rope_type", "linear")),
    "deferral": 1,
    "experts_per_token": 4,
    "normalize_top_k": 1,
    "rms_norm_eps": 1e-6,
    "attention_bias": 1,
    "kv_scales_digest": "ef" * 32,
    "sinks": 4,
    "adapter_digest": "01" * 32,
    "attention": ((1, "full"), (1, "window:128")),
    "state": ((2, "latent"),),
    "experts": ((1, "dense"), (1, "moe")),
    "formats_digest": "23" * 32,
    "numerics": "amx",
}


def test_every_field_changes_the_namespace() -> None:
    fields = {field.name for field in dataclasses.fields(Identity)} - {"layout_version"}
    assert fields == set(CHANGES)
    spaces = {namespace(b"s" * 32, identity(**{name: CHANGES[name]}).encode()) for name in fields}
    spaces.add(namespace(b"s" * 32, identity().encode()))
    assert len(spaces) == len(fields) + 1


def test_tenant_and_salt_change_the_namespace() -> None:
    encoded = identity().encode()
    spaces = {namespace(secret, encoded, salt) for secret in (b"a", b"b") for salt in (b"", b"x")}
    assert len(spaces) == 4
    assert all(len(each) == 32 for each in spaces)
    spaces |= {namespace(b"a", encoded, salt, opaque=True) for salt in (b"", b"x")}
    assert len(spaces) == 6  # so does it what names a block
    with pytest.raises(InvalidRequest, match="salt"):
        namespace(b"a", encoded, b"x" * 257)


@pytest.mark.parametrize("name", [None, *CHANGES])
def test_an_identity_survives_its_encoding(name: str | None) -> None:
    found = identity(**({name: CHANGES[name]} if name else {}))
    assert decode(found.encode()) == found


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_kv_that_depends_on_the_total_length_is_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match=r"identity\.rope_scaling"):
        identity(rope_scaling=(("rope_type", kind),))


def changed(**changes: Any) -> bytes:
    """The encoding with other values in it, without a field that is `gone`."""
    return edited(identity().encode(), changes)


def edited(encoded: bytes, changes: dict[str, Any]) -> bytes:
    values = {**json.loads(encoded), **changes}
    return canonical({key: value for key, value in values.items() if value != "gone"})


def foreign(**changes: Any) -> Foreign:
    given: dict[str, Any] = {"engine": "vllm", "weights": "main@5f1d", "fields": {"page_size": 16}}
    return Foreign(**{**given, **changes})


def earlier(**changes: Any) -> bytes:
    """Of version 1."""
    encoded = earlier_identity.encode(identity())
    assert encoded is not None
    return edited(encoded, changes)


FORGED = [
    (b"", "identity"),
    (b"x" * 70_000, "identity"),
    (b"\xff", "identity"),
    (b"[" * 60_000, "identity"),
    (b"[]", "identity"),
    (changed(architecture="\ud800"), "identity"),  # half a surrogate
    (changed(layers="gone"), "identity.layers"),
    (changed(path="/x"), "identity.path"),
    (changed(moe_layers=[1, 1]), "identity.moe_layers"),  # of version 1
    (changed(schema="kvc2/3"), "identity.schema"),
    (changed(schema=2), "identity.schema"),
    (changed(layers="2"), "identity.layers"),
    (changed(layers=True), "identity.layers"),
    (changed(layers=-1), "identity.layers"),
    (changed(layers=1 << 40), "identity.layers"),
    (changed(rope_theta=10000), "identity.rope_theta"),
    (changed(rms_norm_eps=0), "identity.rms_norm_eps"),
    (changed(rms_norm_eps=0.0), "identity.rms_norm_eps"),  # the default is not written
    (changed(dtypes=[["a"]]), "identity.dtypes"),
    (changed(dtypes=[["b", "x"], ["a", "x"]]), "identity.dtypes"),
    (changed(weights_digest="AB" * 32), "identity.weights_digest"),
    (changed(kv_dtype="int3"), "identity.kv_dtype"),
    (changed(page_size=17), "identity.page_size"),
    (changed(attention=[]), "identity.attention"),
    (changed(attention=[[2, "full"]]), "identity.attention"),
    (changed(attention=[[1, "mla"], [1, "mla"]]), "identity.attention"),
    (changed(attention=[[2, "mla"], [0, "full"]]), "identity.attention"),
    (changed(attention=[[1 << 31, "mla"]]), "identity.attention"),
    (changed(attention=[["1", "mla"], [1, "full"]]), "identity.attention"),
    (changed(experts=[[1, "dense"], [1, "a b"]]), "identity.experts"),
    (changed(numerics="a b"), "identity.numerics"),
    (changed().replace(b":", b": ", 1), "identity"),
    (earlier(windows=["1"]), "identity.windows"),
    (earlier(moe_layers=[1]), "identity.moe_layers"),
    (earlier(numerics="amx"), "identity.numerics"),  # of version 2
    (earlier(sinks="gone"), "identity.sinks"),
    (earlier(schema="kvc2/1"), "identity"),  # version 1 had no such field
    (edited(foreign().encode(), {"layers": 2}), "identity.layers"),
    (edited(foreign().encode(), {"engine": "gone"}), "identity.engine"),
    (edited(foreign().encode(), {"weights": 5}), "identity.weights"),
    (edited(foreign().encode(), {"fields": []}), "identity.fields"),
    (edited(foreign().encode(), {"fields": {}}), "identity.fields.page_size"),
    (edited(foreign().encode(), {"fields": {"page_size": 48}}), "identity.fields.page_size"),
    (edited(foreign().encode(), {"fields": {"page_size": True}}), "identity.fields.page_size"),
    (edited(foreign().encode(), {"fields": {"page_size": 16, "x": [1]}}), "identity.fields.x"),
    (edited(foreign().encode(), {"fields": {"page_size": 16, "x": None}}), "identity.fields.x"),
    (edited(foreign().encode(), {"fields": {"page_size": 16, "": 1}}), "identity.fields"),
    (foreign().encode() + b" ", "identity"),
]


@pytest.mark.parametrize(("encoded", "field"), FORGED)
def test_a_forged_identity_is_refused_by_name(encoded: bytes, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(encoded)
    assert caught.value.field == field
    with pytest.raises(InvalidRequest):
        namespace(b"s" * 32, encoded)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_number_that_is_none_is_refused(number: float) -> None:
    for name in ("rope_theta", "rms_norm_eps"):
        with pytest.raises(InvalidRequest, match=name):
            identity(**{name: number})
    with pytest.raises(InvalidRequest, match=r"identity\.fields\.x"):
        foreign(fields={"page_size": 16, "x": number})
    with pytest.raises(InvalidRequest):
        decode(identity().encode().replace(b"10000.0", json.dumps(number).encode()))


def test_what_a_daemon_does_not_know_is_refused_with_what_it_knows() -> None:
    with pytest.raises(InvalidRequest, match=r"'kvc2/3'.*kvc2/1, kvc2/2, foreign/1"):
        decode(changed(schema="kvc2/3"))
    with pytest.raises(InvalidRequest, match=r"identity\.numerix.*kvc2/2.*numerics"):
        decode(changed(numerix="amx"))


def test_a_field_at_its_default_is_not_written() -> None:
    values = json.loads(identity().encode())
    needed = {each.name for each in dataclasses.fields(Identity) if each.default is MISSING}
    assert values.keys() == needed | {"schema"}
    assert values["schema"] == "kvc2/2"
    spelled = identity(layout_version=1, attention=by_layer(["full", "full"], "full"))
    assert spelled.encode() == identity().encode()


def test_by_layer_is_as_short_as_it_can_be() -> None:
    assert by_layer(["moe", "moe", "dense", "moe"], "dense") == (
        (2, "moe"),
        (1, "dense"),
        (1, "moe"),
    )
    assert by_layer(["dense"] * 60, "dense") == ()
    assert by_layer(["moe"] * 60, "dense") == ((60, "moe"),)


def test_a_digest_of_formats_tells_classes_and_layers_apart() -> None:
    plain = {"attention": "bfloat16", "experts": "int4-group128"}
    layers = {**plain, "experts": ["int4-group128", "bfloat16", "int4-group128"]}
    turned = {**plain, "experts": ["int4-group128", "int4-group128", "bfloat16"]}
    other = {"attention": "int4-group128", "experts": "bfloat16"}
    found = {formats_digest(each) for each in (plain, layers, turned, other)}
    assert len(found) == 4
    assert all(len(each) == 64 for each in found)
    repeated = {**plain, "experts": ["int4-group128"] * 3}
    assert formats_digest(repeated) == formats_digest(plain)
    computed = {"attention": "bfloat16", "experts": "bfloat16"}
    assert formats_digest(plain, computed) == formats_digest({"experts": "int4-group128"})
    assert formats_digest(computed, computed) == formats_digest({}) == ""
    with pytest.raises(InvalidRequest, match="formats"):
        formats_digest({"experts": "int 4"})
    assert identity(formats_digest=formats_digest(plain)).encode() != identity().encode()


# ---- version 1 ----

# As the engines of version 1 sent them, byte for byte.
SENT = [
    b'{"adapter_digest":"","architecture":"Qwen3MoeForCausalLM","attention":"full",'
    b'"attention_bias":0,"deferral":0,"dtypes":[["attention","bfloat16"],["embedding","bfloat16"],'
    b'["experts","bfloat16"],["norms","bfloat16"],["router","bfloat16"]],"expert_group_size":0,'
    b'"expert_quantisation":"","experts_per_token":8,"head_size":128,"kv_dtype":"bfloat16",'
    b'"kv_heads":4,"kv_scales_digest":"","layers":3,"layout_version":1,"moe_layers":%s,'
    b'"normalize_top_k":1,"page_size":16,"rms_norm_eps":1e-06,"rope_scaling":[["factor","1.0"],'
    b'["rope_type","default"]],"rope_theta":1000000.0,"sinks":0,"weights_digest":"%s","windows":%s}'
    % (moe_layers, b"ab" * 32, windows)
    for moe_layers in (b"[1,1,1]", b"[0,1,1]", b"[0,0,0]")
    for windows in (b"[]", b"[0,128,0]")
]


@pytest.mark.parametrize("sent", SENT)
def test_the_same_model_has_the_namespace_that_version_1_gave_it(sent: bytes) -> None:
    secret, found = b"s" * 32, decode(sent)
    assert isinstance(found, Identity)
    assert found.encode() != sent
    message = len(sent).to_bytes(8, "little") + sent + b"salt"
    name = hmac.digest(secret, message, "sha256")
    assert namespace(secret, sent, b"salt") == name
    assert namespace(secret, found.encode(), b"salt") == name
    assert fields_of(sent) == fields_of(found.encode())


def test_what_version_1_could_not_say_has_a_name_of_its_own() -> None:
    for name in ("state", "formats_digest", "numerics"):
        known = identity(**{name: CHANGES[name]})
        assert earlier_identity.encode(known) is None
        assert named_by(known.encode()) == known.encode()
    mixed = identity(attention=((1, "full"), (1, "linear")))
    assert named_by(mixed.encode()) == mixed.encode()


def test_what_only_version_1_could_say_keeps_its_name() -> None:
    for changes in ({"expert_quantisation": "int8", "expert_group_size": 64}, {"windows": [0, 0]}):
        sent = earlier(**changes)
        decode(sent)
        assert named_by(sent) == sent
    quantised = decode(earlier(expert_quantisation="int8"))
    assert isinstance(quantised, Identity)
    assert quantised.formats_digest


KINDS = st.sampled_from(
    ["full", "window:1", "window:128", "window:01", "window:99999999999", "mla"]
)


@st.composite
def identities(draw: st.DrawFn) -> Identity:
    layers = draw(st.integers(1, 4))
    several = [st.lists(each, min_size=layers, max_size=layers) for each in (KINDS, EXPERTS)]
    return identity(
        layers=layers,
        attention=by_layer(draw(several[0]), "full"),
        experts=by_layer(draw(several[1]), "dense"),
        experts_per_token=draw(st.integers(0, 1)),
        numerics=draw(st.sampled_from(["", "amx"])),
        formats_digest=draw(st.sampled_from(["", "ab" * 32])),
    )


EXPERTS = st.sampled_from(["dense", "moe", "shared"])


@given(st.lists(identities(), min_size=2, max_size=8))
def test_no_two_identities_have_one_name(given: list[Identity]) -> None:
    names = {each: named_by(each.encode()) for each in given}
    assert len(set(names.values())) == len(names)
    for known, name in names.items():
        assert decode(known.encode()) == known
        assert decode(name) == known  # so what version 1 sent is what it was taken for


# ---- other engines ----


def test_another_engines_identity_survives_its_encoding_and_names_a_namespace() -> None:
    fields = {"page_size": 16, "backend": "FLASH", "scale": 0.5, "eager": True, "layers": 30}
    known = foreign(fields=fields)
    assert decode(known.encode()) == known
    assert known.encode() == (
        b'{"engine":"vllm","fields":{"backend":"FLASH","eager":true,"layers":30,"page_size":16,'
        b'"scale":0.5},"schema":"foreign/1","weights":"main@5f1d"}'
    )
    assert weights_of(known.encode()) == "main@5f1d"
    changes = [{"engine": "sglang"}, {"weights": "x"}, {"fields": {**fields, "scale": 1.0}}]
    changes += [{"fields": {**fields, "scale": 1}}, {"fields": {**fields, "scale": True}}]
    others = [foreign(**{"fields": fields, **each}) for each in changes]
    names = {namespace(b"s" * 32, each.encode()) for each in (known, *others)}
    assert len(names) == len(changes) + 1
    for one in others:
        assert differing(known.encode(), one.encode())


def test_of_another_engines_pages_only_their_tokens_are_known() -> None:
    check_layout(foreign(), layout())
    check_layout(foreign(), layer_major(7, 4, segment_bytes=64, page_size=16))
    with pytest.raises(InvalidRequest, match=r"identity\.page_size"):
        check_layout(foreign(fields={"page_size": 32}), layout())


def test_an_identity_of_64_kib_is_the_largest() -> None:
    size = 65536 - len(foreign(fields={"page_size": 16, "x": ""}).encode())
    fits = foreign(fields={"page_size": 16, "x": "x" * size})
    assert decode(fits.encode()) == fits
    with pytest.raises(InvalidRequest, match="65537"):
        decode(foreign(fields={"page_size": 16, "x": "x" * (size + 1)}).encode())


def test_the_fields_that_differ_are_named() -> None:
    def names(one: bytes, two: bytes) -> list[str]:
        return [each.name for each in differing(one, two)]

    assert names(identity().encode(), identity(numerics="amx", sinks=4).encode()) == [
        "numerics",
        "sinks",
    ]
    (told,) = differing(identity().encode(), identity(attention=((2, "mla"),)).encode())
    assert "mla" in told.theirs
    assert names(earlier(), identity().encode()) == []
    assert names(earlier(windows=[0, 128]), identity().encode()) == ["attention"]
    other = foreign(engine="sglang", fields={"page_size": 16, "layout": "NHD"})
    assert names(foreign().encode(), other.encode()) == ["engine", "fields.layout"]
    assert "schema" in names(foreign().encode(), identity().encode())


def test_an_identity_must_fit_the_sessions_pages() -> None:
    check_layout(identity(), layout())
    with pytest.raises(InvalidRequest, match=r"identity\.page_size"):
        check_layout(identity(page_size=32), layout())
    with pytest.raises(InvalidRequest, match=r"identity\.layers"):
        check_layout(identity(layers=3), layout())
    with pytest.raises(InvalidRequest, match="kv_dtype"):
        check_layout(identity(kv_dtype="bfloat16"), layout())
    with pytest.raises(InvalidRequest, match="kv_heads"):
        check_layout(identity(), layer_major(2, 4, segment_bytes=64, page_size=16))

"""Identity: everything that changes KV changes the namespace, nothing else does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kvc2.errors import InvalidRequest
from kvc2.layout import layer_major
from kvc2.namespace import Identity, check_layout, decode, namespace
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
    "expert_quantisation": "int8",
    "expert_group_size": 128,
    "deferral": 1,
    "experts_per_token": 4,
    "normalize_top_k": 1,
    "moe_layers": (0, 1),
    "rms_norm_eps": 1e-6,
    "attention_bias": 1,
    "kv_scales_digest": "ef" * 32,
    "attention": "mla",
    "windows": (0, 128),
    "sinks": 4,
    "adapter_digest": "01" * 32,
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
    values = {**json.loads(identity().encode()), **changes}
    kept = {key: value for key, value in values.items() if value != "gone"}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("encoded", "field"),
    [
        (b"", "identity"),
        (b"x" * 70_000, "identity"),
        (b"\xff", "identity"),
        (b"[" * 60_000, "identity"),
        (b"[]", "identity"),
        (changed(layers="gone"), "identity.layers"),
        (changed(path="/x"), "identity.path"),
        (changed(layers="2"), "identity.layers"),
        (changed(layers=True), "identity.layers"),
        (changed(layers=-1), "identity.layers"),
        (changed(layers=1 << 40), "identity.layers"),
        (changed(rope_theta=10000), "identity.rope_theta"),
        (changed(rope_theta=float("inf")), "identity.rope_theta"),
        (changed(rope_theta=float("nan")), "identity.rope_theta"),
        (changed(windows=["1"]), "identity.windows"),
        (changed(moe_layers=[1]), "identity.moe_layers"),
        (changed(rms_norm_eps=0), "identity.rms_norm_eps"),
        (changed(dtypes=[["a"]]), "identity.dtypes"),
        (changed(dtypes=[["b", "x"], ["a", "x"]]), "identity.dtypes"),
        (changed(weights_digest="AB" * 32), "identity.weights_digest"),
        (changed(kv_dtype="int3"), "identity.kv_dtype"),
        (changed(page_size=17), "identity.page_size"),
        (changed().replace(b":", b": ", 1), "identity"),
    ],
)
def test_a_forged_identity_is_refused_by_name(encoded: bytes, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(encoded)
    assert caught.value.field == field


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

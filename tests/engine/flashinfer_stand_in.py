"""flashinfer's paged prefill as its documentation says, in float32 torch on the CPU. Each call is
bound to the signatures of a real version (flashinfer_signatures.json), so that a changed API shows,
and what a kernel would silently misread (a type, a prefix sum, a last page) is refused.
"""

from __future__ import annotations

import inspect
import json
import types
from pathlib import Path
from typing import Any

import torch

from engine.batch import Slice

SIGNATURES = json.loads(Path(__file__).with_name("flashinfer_signatures.json").read_text())
SLICES = {
    "a whole prompt": [Slice(range(37), 37, [5, 2, 9], True)],
    "a chunk on a prefix": [Slice(range(20), 100, [7, 1, 4, 11, 0, 3, 8], True)],
    "decodes": [Slice([1], 48, [6, 2, 5], True), Slice([2], 17, [9, 10], True)],
    "a full page": [Slice(range(16), 32, [3, 4], True)],
    "all of it": [
        Slice(range(37), 37, [5, 2, 9], True),
        Slice([1], 48, [6, 12, 13], True),
        Slice(range(20), 100, [7, 1, 4, 11, 0, 3, 8], True),
    ],
}


def bound(version: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's arguments by name, its own or the version's defaults. TypeError: it is no call."""
    parameters = [
        inspect.Parameter(each["name"], inspect._ParameterKind[each["kind"]], default=default)
        for each in SIGNATURES[version][method]
        for default in [each.get("default", inspect.Parameter.empty)]
    ]
    call = inspect.Signature(parameters).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def stand_in(version: str) -> types.ModuleType:
    """A module `flashinfer` of this version."""
    module = types.ModuleType("flashinfer")

    class Wrapper(PagedPrefill):
        VERSION = version

    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    return module


class PagedPrefill:
    """BatchPrefillWithPagedKVCacheWrapper."""

    VERSION = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = bound(self.VERSION, "__init__", (self, *args), kwargs)
        workspace = given["float_workspace_buffer"]
        assert workspace.dtype == torch.uint8
        assert workspace.numel() >= 128 << 20
        assert given["backend"] in ("fa2", "fa3"), "a backend by name"
        self._by_head = given["kv_layout"] == "HND"

    def plan(self, *args: Any, **kwargs: Any) -> None:
        p = bound(self.VERSION, "plan", (self, *args), kwargs)
        starts, pages, last = (
            p[name] for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_last_page_len")
        )
        for each in (starts, pages, last, p["paged_kv_indices"]):
            assert each.dtype == torch.int32
            assert each.dim() == 1
            assert each.is_cpu, "flashinfer plans on the host"
        assert starts[0] == pages[0] == 0
        assert len(starts) == len(pages) == len(last) + 1
        assert (starts.diff() > 0).all()
        assert (pages.diff() > 0).all()
        assert pages[-1] == len(p["paged_kv_indices"])
        assert ((last >= 1) & (last <= p["page_size"])).all()
        assert p["causal"]
        assert p["num_qo_heads"] % p["num_kv_heads"] == 0
        assert p["q_data_type"] in (torch.float16, torch.bfloat16), "it has no float32 kernels"
        assert p["kv_data_type"] in (None, p["q_data_type"])
        self._planned = p

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given, p = bound(self.VERSION, "run", (self, *args), kwargs), self._planned
        query, (keys, values) = given["q"], given["paged_kv_cache"]
        heads, groups = p["num_qo_heads"], p["num_kv_heads"]
        dim, size = p["head_dim_qk"], p["page_size"]
        assert query.shape == (int(p["qo_indptr"][-1]), heads, dim)
        assert query.dtype == p["q_data_type"]
        page = (groups, size, dim) if self._by_head else (size, groups, dim)
        assert keys.shape[1:] == page == values.shape[1:]
        assert keys.stride() == values.stride()
        assert keys.stride(-1) == 1
        out = torch.empty_like(query)
        for row in range(len(p["paged_kv_last_page_len"])):
            begin, end = p["qo_indptr"][row : row + 2].tolist()
            out[begin:end] = self._one(row, query[begin:end], keys, values).to(out.dtype)
        return out

    def _one(
        self, row: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """[queries, heads, dim] of one sequence, in float32."""
        p = self._planned
        heads, groups, dim = p["num_qo_heads"], p["num_kv_heads"], p["head_dim_qk"]
        first, after = p["paged_kv_indptr"][row : row + 2].tolist()
        pages = p["paged_kv_indices"][first:after].long()
        tokens = (len(pages) - 1) * p["page_size"] + int(p["paged_kv_last_page_len"][row])
        assert tokens >= len(query), "causal: more queries than keys"

        def flat(part: torch.Tensor) -> torch.Tensor:
            by_token = part[pages].transpose(1, 2) if self._by_head else part[pages]
            rows = by_token.reshape(-1, groups, dim)[:tokens].float()
            return rows.repeat_interleave(heads // groups, 1).transpose(0, 1)

        scores = query.float().transpose(0, 1) @ flat(keys).transpose(1, 2)
        scores = scores * (p["sm_scale"] or dim**-0.5)
        places = torch.arange(tokens - len(query), tokens).unsqueeze(1)
        scores.masked_fill_(torch.arange(tokens) > places, -torch.inf)
        return (scores.softmax(-1) @ flat(values)).transpose(0, 1)

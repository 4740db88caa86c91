"""flashinfer's paged prefill as its documentation says, in float32 torch on the CPU. Each call is
bound to the signatures of a real version (flashinfer_signatures.json), so that a changed API shows,
and what a kernel would silently misread (a type, a prefix sum, a last page) is refused.

A context is divided as PrefillPlan of flashinfer/attention/scheduler.cuh does it (read in 0.6.13),
for a GPU of CTAS blocks, and its parts are merged. For graphs a run reads what lies in the buffers
then, and fails where it was launched for another division.
"""

from __future__ import annotations

import inspect
import json
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import library

from engine.batch import Slice

CTAS = 16  # blocks that run at once, of all KV heads
PLANNED = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
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


@dataclass(frozen=True)
class Division:
    """Of a step's contexts: pages of a part, and what a launch of the kernel is made for: blocks,
    queries of a block, whether parts are merged."""

    part_pages: int
    blocks: int
    tile: int
    merges: bool

    @property
    def launch(self) -> list[int]:
        return [self.blocks, self.tile, int(self.merges)]


def divided(p: dict[str, Any], *, graph: bool) -> Division:
    """RuntimeError as flashinfer's own, where a graph's blocks don't suffice."""
    group = p["num_qo_heads"] // p["num_kv_heads"]
    queries = (p["qo_indptr"].diff() * group).tolist()
    pages = p["paged_kv_indptr"].diff().tolist()
    at_once = CTAS // p["num_kv_heads"]
    rows, count = sum(queries) // group, len(queries)
    tile = tile_of((rows - count + 1) * group if graph else sum(queries) // count)
    tiles = sum(-(-n // tile) for n in queries)
    if graph:
        tiles = -(-rows * group // tile) + count - 1

    def blocks(part: int) -> int:
        return sum(-(-n // tile) * -(-many // part) for n, many in zip(queries, pages, strict=True))

    if p["disable_split_kv"]:
        part, merges = max(pages), False
    elif (p["fixed_split_size"] or -1) > 0:
        part = p["fixed_split_size"]
        merges = max(pages) > part
    else:
        least = max(128 // p["page_size"], 1)
        fits = (n for n in range(least, max(pages)) if blocks(n) <= at_once)
        part = next(fits, max(pages, default=least))
        merges = graph or part < max(pages)
    needed, most = blocks(part), max(at_once, tiles)
    if graph and needed > most:
        raise RuntimeError("new batch size should not exceed padded batch size")
    return Division(part, most if graph else needed, tile, merges)


def tile_of(queries: int) -> int:
    return 128 if queries > 64 else 64 if queries > 16 else 16


class PagedPrefill:
    """BatchPrefillWithPagedKVCacheWrapper."""

    VERSION = ""
    TYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = bound(self.VERSION, "__init__", (self, *args), kwargs)
        workspace = given["float_workspace_buffer"]
        assert workspace.dtype == torch.uint8
        assert workspace.numel() >= 128 << 20
        assert given["backend"] in ("fa2", "fa3"), "a backend by name"
        self._by_head = given["kv_layout"] == "HND"
        self._graph = given["use_cuda_graph"]
        self._fixed = [given[f"{name}_buf"] for name in PLANNED]
        self._rows: int | None = None
        self._launch = torch.zeros(4, dtype=torch.int64)  # the workspace that the kernel reads
        if self._graph:
            sizes = [len(each) for each in self._fixed]
            assert sizes[0] == sizes[1] == sizes[3] + 1

    def plan(self, *args: Any, **kwargs: Any) -> None:
        p = bound(self.VERSION, "plan", (self, *args), kwargs)
        starts, pages, indices, last = (p[name] for name in PLANNED)
        for each in (starts, pages, last, indices):
            assert each.dtype == torch.int32
            assert each.dim() == 1
            assert each.is_cpu, "flashinfer plans on the host"
        assert starts[0] == pages[0] == 0
        assert len(starts) == len(pages) == len(last) + 1
        assert (starts.diff() > 0).all()
        assert (pages.diff() > 0).all()
        assert pages[-1] == len(indices)
        assert ((last >= 1) & (last <= p["page_size"])).all()
        assert p["causal"]
        assert p["num_qo_heads"] % p["num_kv_heads"] == 0
        assert p["q_data_type"] in self.TYPES, "it has no float32 kernels"
        assert p["kv_data_type"] in (None, p["q_data_type"])
        self._planned, self.division = p, divided(p, graph=self._graph)
        self._tokens = int(starts[-1])
        self._launch.copy_(torch.tensor([self.division.part_pages, *self.division.launch]))
        if not self._graph:
            return
        self._rows = self._rows or self._tokens
        if self._tokens > self._rows or len(starts) != len(self._fixed[0]):
            raise ValueError("batch size and rows are fixed for a graph")
        if len(indices) > len(self._fixed[2]):
            raise ValueError("paged_kv_indices exceeds the allocated buffer size")
        for kept, given in zip(self._fixed, (starts, pages, indices, last), strict=True):
            kept[: len(given)].copy_(given)

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given, p = bound(self.VERSION, "run", (self, *args), kwargs), self._planned
        query, (keys, values) = given["q"], given["paged_kv_cache"]
        heads, groups = p["num_qo_heads"], p["num_kv_heads"]
        dim, size = p["head_dim_qk"], p["page_size"]
        assert query.shape == (self._tokens, heads, dim)
        assert query.dtype == p["q_data_type"]
        page = (groups, size, dim) if self._by_head else (size, groups, dim)
        assert keys.shape[1:] == page == values.shape[1:]
        assert keys.stride() == values.stride()
        assert keys.stride(-1) == 1
        if not self._by_head:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        read = self._fixed if self._graph else [p[name] for name in PLANNED]
        scale = p["sm_scale"] or dim**-0.5
        launch = self.division.launch
        return paged_prefill(query, keys, values, read, self._launch, launch, scale)


@library.custom_op("kvc2_tests::paged_prefill", mutates_args=())
def paged_prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    planned: list[torch.Tensor],
    workspace: torch.Tensor,
    launch: list[int],
    scale: float,
) -> torch.Tensor:
    """The kernel: it knows what lies in memory when it runs, and what it was launched for."""
    starts, page_starts, pages, last = (each.tolist() for each in planned)
    part_pages, *made_for = workspace.tolist()
    if made_for != launch:
        raise RuntimeError(f"launched for blocks, tile and merge {launch}, planned {made_for}")
    out, size = torch.empty_like(query), keys.shape[2]
    for row, in_last in enumerate(last):
        mine = pages[page_starts[row] : page_starts[row + 1]]
        tokens = (len(mine) - 1) * size + in_last
        begin, end = starts[row : row + 2]
        parts = []
        for first in range(0, len(mine), part_pages):
            of = torch.tensor(mine[first : first + part_pages])
            seen = min(tokens - first * size, len(of) * size)
            flat = [
                part[of].transpose(0, 1).flatten(1, 2)[:, :seen].float() for part in (keys, values)
            ]
            places = torch.arange(tokens - (end - begin), tokens) - first * size
            parts.append(attended(query[begin:end].float(), *flat, places, scale))
        out[begin:end] = merged(parts).to(out.dtype)
    return out


def attended(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[queries, heads, dim] and log of the sum [queries, heads], of one part of a context: keys and
    values [kv_heads, tokens, dim], of which a query sees those up to its place."""
    group = query.shape[1] // len(keys)
    keys, values = (each.repeat_interleave(group, 0) for each in (keys, values))
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * scale
    unseen = torch.arange(keys.shape[1]) > places.unsqueeze(1)
    scores = scores.masked_fill(unseen, -math.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    exps = (scores - top).exp()
    total = exps.sum(-1, keepdim=True)
    mixed = exps @ values / total.clamp(min=1e-30)
    return mixed.transpose(0, 1), (total.log() + top).squeeze(-1).transpose(0, 1)


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    logs = torch.stack([log for _, log in parts])
    weights = logs.softmax(0).unsqueeze(-1)
    return (torch.stack([mixed for mixed, _ in parts]) * weights).sum(0)

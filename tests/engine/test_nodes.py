"""Experts split over NUMA nodes: bits follow from the number of parts, and from nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import memory, spellings
from engine.experts.hybrid import HostExecutor, Weights
from engine.experts.nodes import Nodes
from engine.identity import identity_of
from engine.kernels import Choices, workbench_of
from engine.models import load_model
from engine.models.placed import PlacedModel, _split
from engine.serve import numerics_of
from engine.settings import EngineConfig
from kvc2.errors import InvalidConfig
from kvc2.host import numa
from kvc2.namespace import namespace
from tests.doubles.checkpoints import make_mixtral
from tests.engine.test_hybrid import logits

EXPERTS, HIDDEN, SIZE, TOKENS, CHOSEN = 6, 48, 96, 20, 2
TOPOLOGIES: list[list[set[int]]] = [[os.sched_getaffinity(0)], [{0}, {min(1, os.cpu_count() or 1)}]]


def weights(dtype: torch.dtype) -> Weights:
    torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * SIZE, HIDDEN) / 4
    return Weights(gate_up.to(dtype), (torch.randn(EXPERTS, HIDDEN, SIZE) / 4).to(dtype))


def call(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(TOKENS)])
    ids[3, 1] = ids[7, 0] = -1
    return torch.randn(TOKENS, HIDDEN).to(dtype), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("cpus", TOPOLOGIES, ids=["one node", "two nodes"])
def test_outputs_are_the_sums_of_the_parts_in_their_order(
    dtype: torch.dtype, parts: int, cpus: list[set[int]]
) -> None:
    whole, nodes = weights(dtype), Nodes(parts, cpus)
    x, ids = call(dtype)
    split = nodes.split(whole)
    outputs = torch.full((TOKENS, CHOSEN, HIDDEN), 7.0)
    nodes.kernels(2).compute(x, ids, split.gate_up, split.down, outputs)
    each, expected = SIZE // parts, torch.zeros_like(outputs)
    for part in range(parts):
        rows = slice(part * each, (part + 1) * each)
        gate, up = whole.gate_up[:, :SIZE][:, rows], whole.gate_up[:, SIZE:][:, rows]
        made, down = torch.zeros_like(outputs), whole.down[:, :, rows].contiguous()
        Choices(workbench_of(1)).compute(x, ids, torch.cat((gate, up), 1), down, made)
        expected = made if part == 0 else expected + made
    assert torch.equal(outputs[ids >= 0], expected[ids >= 0])
    assert bool((outputs[ids < 0] == 7.0).all())  # another executor's


def test_an_expert_is_copied_with_all_its_parts() -> None:
    split = Nodes(2).split(weights(torch.float32))
    other = split.weights(3)
    other.copy(1, split, 4)
    assert (other.count, other.expert_bytes) == (3, 3 * SIZE * HIDDEN * 4)
    assert torch.equal(other.gate_up[:, 1], split.gate_up[:, 4])
    assert torch.equal(other.down[:, 1], split.down[:, 4])


def test_each_part_runs_on_its_node() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    cpus = [{allowed[0]}, {allowed[-1]}]
    assert Nodes(3, cpus).each(lambda _: os.sched_getaffinity(0)) == [cpus[0], cpus[1], cpus[0]]
    assert os.sched_getaffinity(0) == set(allowed)


def test_the_topology_is_what_linux_tells_of_the_cpus_that_are_allowed(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    assert numa.cpus_by_node(tmp_path) == [allowed]
    (tmp_path / "has_memory").write_text("0-2\n")
    lists = [str(min(allowed)), "900-903", ",".join(map(str, sorted(allowed)))]
    for node, text in enumerate(lists):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(text + "\n")
    assert numa.cpus_by_node(tmp_path) == [{min(allowed)}, allowed]


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def test_a_layer_that_is_split_gives_its_memory_back() -> None:
    """Though the loaded model still holds its tensors: else a split model would be there twice."""
    shapes = (4, 4096, 1024), (4, 1024, 2048)
    assert all(torch.Size(shape).numel() * 4 > memory.OWN_BYTES for shape in shapes)
    before = resident_bytes()
    loaded = [
        Weights(*(memory.empty(shape, torch.float32).fill_(1) for shape in shapes))
        for _ in range(3)
    ]
    num_bytes = resident_bytes() - before
    assert num_bytes > 250e6
    host = HostExecutor(dict(enumerate(loaded)), Choices(workbench_of(1)))
    _split(EngineConfig(model=Path(), expert_nodes=2), host, Nodes(2))
    assert resident_bytes() - before < 1.2 * num_bytes
    assert [float(split.down.sum()) for split in host.layers.values()] == [4 * 1024 * 2048] * 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixtral(tmp_path_factory.mktemp("model"))


def test_where_experts_lie_changes_no_bit_of_a_number_of_parts(model_dir: Path) -> None:
    placements: list[dict[str, Any]] = [
        {},
        {"num_gpu_experts": 2},
        {"gpu_experts_ratio": 0.5, "enable_dynamic_expert_update": True},
        {"gpu_experts_ratio": 0.5, "gpu_prefill_token_threshold": 8},
    ]
    found = {}
    for parts in (1, 2):
        rows = []
        for fields in placements:
            model = load_model(model_dir)
            config = EngineConfig(model=model_dir, threads=2, expert_nodes=parts, **fields)
            placed = PlacedModel(config, model)
            rows.append(logits(model, placed))
            placed.close()
        assert all(torch.equal(each, rows[0]) for each in rows)
        found[parts] = rows[0]
    assert not torch.equal(found[1], found[2])


def test_other_bits_are_another_class_of_numerics(model_dir: Path) -> None:
    model = load_model(model_dir)
    config = EngineConfig(model=model_dir)
    classes = {numerics_of(replace(config, expert_nodes=parts), model) for parts in (1, 2, 3)}
    assert len(classes) == 3
    unlike = numerics_of(config, model, "cuda:avx2")
    assert unlike == f"{numerics_of(config, model)}:cuda:avx2"
    assert namespace(b"s" * 32, identity_of(model.config, bytes(32), 16, numerics=unlike).encode())
    assert spellings.arguments(["--kt-threadpool-count=2"]) == ["--expert-nodes=2"]


def test_what_can_not_be_split_is_refused(model_dir: Path) -> None:
    config = EngineConfig(model=model_dir, threads=1, expert_nodes=5)
    with pytest.raises(InvalidConfig, match=r"expert_nodes = 5: an inner size of 96 has no 5"):
        PlacedModel(config, load_model(model_dir))

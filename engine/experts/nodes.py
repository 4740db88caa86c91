"""Experts split by their inner size over NUMA nodes, so that each node's threads read its memory.

    node 0    gate_up[:, 0 : s], down[:, :, 0 : s]     -> outputs of that part of the inner size
    node 1    gate_up[:, s : 2 s], down[:, :, s : 2 s] -> the same, at the same time
                                          outputs = part 0 + part 1 + ..., in this order

The order of a sum decides its bits: so the number of parts is part of the numerics, whoever
computes them, and a machine of one node that is told to give two parts has the bits of one that
has two. One part is what there is without this file. Not responsible for which experts lie where.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from engine.experts.hybrid import Weights
from engine.kernels import Choices, workbench_of
from kvc2.host import numa

Made = TypeVar("Made")


@dataclass(frozen=True)
class SplitWeights(Weights):
    """Experts in as many parts as nodes, each in one piece: gate_up [parts, n, 2 * size / parts,
    hidden], gate first in each part; down [parts, n, hidden, size / parts]."""

    nodes: Nodes

    @property
    def count(self) -> int:
        return self.gate_up.shape[1]

    def weights(self, count: int) -> SplitWeights:
        made = [
            self.gate_up.new_empty(len(whole), count, *whole.shape[2:])
            for whole in (self.gate_up, self.down)
        ]
        self.nodes.each(lambda part: [each[part].zero_() for each in made])  # the first to touch it
        return SplitWeights(made[0], made[1], self.nodes)

    @property
    def expert_bytes(self) -> int:
        elements = self.gate_up[:, 0].numel() + self.down[:, 0].numel()
        return elements * self.gate_up.dtype.itemsize

    def copy(self, place: int, source: Weights, index: int) -> None:
        self.gate_up[:, place].copy_(source.gate_up[:, index])
        self.down[:, place].copy_(source.down[:, index])


class Nodes:
    """`parts` of each expert, part i on node i of the machine, and again from the first where it
    has fewer. `cpus`: of each node."""

    def __init__(self, parts: int, cpus: Sequence[set[int]] | None = None) -> None:
        there = numa.cpus_by_node() if cpus is None else cpus
        self.parts = parts
        self.cpus = [there[part % len(there)] for part in range(parts)]
        self._beside = [
            ThreadPoolExecutor(
                1, f"kvc2-node-{part}", initializer=_run_on, initargs=(self.cpus[part],)
            )
            for part in range(parts)
        ]

    def each(self, work: Callable[[int], Made]) -> list[Made]:
        """work(part) for all parts at the same time, each by a thread of its node."""
        begun = [pool.submit(work, part) for part, pool in enumerate(self._beside)]
        return [each.result() for each in begun]

    def kernels(self, threads: int) -> SplitChoices:
        """Of so many threads in all, at least one a node, which run where the thread runs that
        makes them. Others' calls run beside theirs."""
        own, least = Nodes(self.parts, self.cpus), max(1, threads // self.parts)
        return SplitChoices(own, own.each(lambda _: Choices(workbench_of(least))))

    def split(self, whole: Weights) -> SplitWeights:
        """Each part in its node's memory. Raises ValueError where there are no such parts."""
        if whole.gate_up.ndim == 2:  # records
            raise ValueError("quantised experts are not split: take --expert-dtype bf16")
        count, rows, hidden = whole.gate_up.shape
        size = rows // 2
        if size % self.parts:
            raise ValueError(f"an inner size of {size} has no {self.parts} equal parts")
        each = size // self.parts
        gate_up = whole.gate_up.new_empty(self.parts, count, 2 * each, hidden)
        down = whole.down.new_empty(self.parts, count, hidden, each)

        def fill(part: int) -> None:
            begin, end = part * each, (part + 1) * each
            gate_up[part, :, :each] = whole.gate_up[:, begin:end]
            gate_up[part, :, each:] = whole.gate_up[:, size + begin : size + end]
            down[part] = whole.down[:, :, begin:end]

        self.each(fill)
        return SplitWeights(gate_up, down, self)


class SplitChoices:
    """Kernels of weights in parts. One call at a time."""

    def __init__(self, nodes: Nodes, kernels: Sequence[Choices]) -> None:
        self._nodes = nodes
        self._kernels = kernels

    def compute(
        self, x: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor, outputs: Tensor
    ) -> None:
        """As kernels.Choices, of gate_up and down as SplitWeights has them."""

        def part(index: int) -> Tensor:
            made = torch.empty_like(outputs)
            kernels = self._kernels[index]
            kernels.compute(x, expert_ids, gate_up[index], down[index], made)
            return made

        total, *others = self._nodes.each(part)
        for each in others:
            total += each
        ours = expert_ids.numpy() >= 0
        outputs.numpy()[ours] = total.numpy()[ours]  # of a step that may infer, as this needn't


def _run_on(cpus: set[int]) -> None:
    os.sched_setaffinity(0, cpus)

"""Decode steps that are captured once for a number of rows, and replayed from then on: the host
launches one graph in the place of each layer's kernels.

    n decodes -> the next size N >= n -> padded to N rows -> planned by the host -> replayed

A size is captured at its first step. All else is computed as before: prefill and mixed steps, more
decodes than the largest size, layers of a prefix that are still under way, what an attention's
fixed plan doesn't hold, and everything where a capture failed once. The only file that names
torch's graphs and streams: also of what runs beside a device's own work (SideStream). On the CPU
stand-ins of both were run (tests/engine/graph_tape); CudaRecorder and CudaSideStream never were.
Not responsible for what a step computes (runner).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.attention.base import Attention
from engine.batch import Batch
from engine.config import ModelConfig
from kvc2.cuda.faults import CudaFault

log = logging.getLogger(__name__)

# (attention, token_ids int64 [N], positions int64 [N]) -> float32 logits [N, vocab]
Compute = Callable[[Attention, Tensor, Tensor], Tensor]
Replay = Callable[[], None]
Moment = Any  # as a SideStream marks them


class Recorder(Protocol):
    """What captures work on a device."""

    def capture(self, compute: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Records what `compute` launches. Each replay launches the same on the same memory, which
        fills the tensor: it holds nothing before the first. What `compute` reads must stay where it
        is, and it may not wait for the device: RuntimeError."""


class CudaRecorder:
    """CUDA graphs. They share one memory for what lies between two kernels, since one is replayed
    at a time. Never run on hardware."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, compute: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """As `Recorder`. Computed once before: what libraries make at their first call, such as
        workspaces, can't be captured."""
        now = torch.cuda.current_stream(self._device)
        beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        beside.wait_stream(now)
        with torch.cuda.stream(beside):
            compute()
        now.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(now):  # again the current one, also after a capture that failed
            # other threads' calls are theirs
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode=mode):
                made = compute()
        return graph.replay, made


class SideStream(Protocol):
    """Work in order beside what the device computes: copies, and the host's own in between. A
    capture holds it too."""

    def fork(self) -> None:
        """What is begun here from now on comes after what the device was told so far."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """From the device to `pinned` memory, or back. Both must stay until `join`."""

    def call(self, work: Callable[[], None]) -> None:
        """The host runs it, on another thread, when what came before here is done: at each replay
        too, so that it must stay. It asks nothing of the device, and raises nothing."""

    def join(self) -> None:
        """What the device is told from now on comes after what was begun here."""

    def wait(self) -> None:
        """The host waits until all of it is done, and what was replayed."""

    def mark(self) -> Moment | None:
        """Of the device's own work: when all is done that it was told so far. None in a capture,
        whose replays have no moments."""

    def seconds(self, began: Moment, ended: Moment) -> float:
        """Between two, after `wait`."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in the host's memory."""


class HostFunctions:
    """Python that CUDA streams call, on a thread of the driver's: by cuda-bindings, since torch has
    no call for it. Run on the hostile driver of tests/cuda alone."""

    def __init__(self) -> None:
        from kvc2.cuda import driver  # the extra `cuda`

        self._driver = driver
        self._functions: dict[Callable[[], None], Any] = {}  # the driver doesn't keep them

    def launch(self, work: Callable[[], None], stream: int) -> None:
        """It runs when what `stream` was told before is done; at each replay of a capture too.
        Kept for ever: whoever calls gives the same few again and again. Raises CudaFault."""
        if work not in self._functions:
            self._functions[work] = _HOST_FUNCTION(lambda _: work())
        address = ctypes.cast(self._functions[work], ctypes.c_void_p).value
        cu = self._driver.cu
        self._driver.ask(cu.cuLaunchHostFunc, cu.CUstream(stream), cu.CUhostFn(address), 0)


_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class CudaSideStream:
    """A CUDA stream and its host functions. Never run on hardware."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._functions = HostFunctions()

    def fork(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, source: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def call(self, work: Callable[[], None]) -> None:
        self._functions.launch(work, self._stream.cuda_stream)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def mark(self) -> Moment | None:
        if torch.cuda.is_current_stream_capturing():
            return None
        moment = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        moment.record(torch.cuda.current_stream(self._device))
        return moment

    def seconds(self, began: Moment, ended: Moment) -> float:
        return float(began.elapsed_time(ended)) / 1e3

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)


@dataclass(frozen=True)
class GraphSizes:
    """Rows for which decode steps are captured, ascending; none: none is. `page`: of the pool, that
    rows which only pad write to and nobody reads."""

    rows: tuple[int, ...] = ()
    page: int = 0


class Step:
    """A step of so many decodes: its input at fixed addresses, and its graph once there is one."""

    def __init__(self, attention: Attention, rows: int, memory: torch.device) -> None:
        self.attention = attention
        self.token_ids, self.positions = (
            torch.zeros(rows, dtype=torch.int64, device=memory) for _ in range(2)
        )
        self.graph: tuple[Replay, Tensor] | None = None

    def fill(self, batch: Batch) -> None:
        """The input of the next replay."""
        self.attention.plan(batch)
        self.token_ids.copy_(batch.token_ids)
        self.positions.copy_(batch.positions)


class Graphs:
    """A model's decode steps by their rows. One step at a time, from one thread."""

    def __init__(
        self,
        sizes: GraphSizes,
        recorder: Recorder,
        *,
        attention: Attention,
        memory: torch.device,
        compute: Compute,
    ) -> None:
        self._sizes = sizes
        self._recorder = recorder
        self._attention = attention
        self._memory = memory
        self._compute = compute
        self._steps: dict[int, Step] = {}

    @property
    def captured(self) -> list[int]:
        """Rows of the steps that were captured so far."""
        return sorted(rows for rows, step in self._steps.items() if step.graph is not None)

    def logits(self, batch: Batch) -> Tensor | None:
        """float32 [R, vocab] as `Runner.step`, its KV in its pages; None: nothing was computed,
        this is no step for a graph."""
        rows = next((n for n in self._sizes.rows if n >= len(batch.token_ids)), None)
        if rows is None or not batch.only_decodes:
            return None
        step = self._step(rows)
        if step is None or not step.attention.holds(batch):
            return None
        step.fill(batch.padded(rows, self._sizes.page))
        if step.graph is None:
            step.graph = self._capture(step)
            if step.graph is None:
                return None
            log.info("decode steps of %d rows are replayed from a graph from now on", rows)
        replay, logits = step.graph
        replay()
        return logits[: len(batch.token_ids)].clone()  # the next replay fills it anew

    def _step(self, rows: int) -> Step | None:
        if rows not in self._steps:
            attention = self._attention.captured(rows)
            if attention is None:
                self._give_up(f"{type(self._attention).__name__} has no fixed plans")
                return None
            self._steps[rows] = Step(attention, rows, self._memory)
        return self._steps[rows]

    def _capture(self, step: Step) -> tuple[Replay, Tensor] | None:
        try:
            return self._recorder.capture(
                lambda: self._compute(step.attention, step.token_ids, step.positions)
            )
        except (RuntimeError, CudaFault) as error:  # torch raises RuntimeError of CUDA too
            self._give_up(f"a step of {len(step.token_ids)} can't be captured: {error}")
            return None

    def _give_up(self, why: str) -> None:
        log.warning("no decode step is replayed from a graph: %s", why)
        self._sizes = GraphSizes()
        self._steps.clear()  # with what they have on the device


def graph_bytes(model: ModelConfig, rows: Sequence[int]) -> int:
    """About what graphs of these sizes take on the device: the logits of each, and once, of the
    largest, what lies between kernels (a layer's, and logits in the model's type). Without the
    plans of attention (8 bytes a page of the pool and size), and without what a driver keeps of a
    graph itself, which only hardware can tell."""
    if not rows:
        return 0
    c = model
    heads = (c.query_heads + 2 * c.kv_heads) * c.head_dim
    chosen = max(1, c.experts_per_token) * (3 * max(c.expert_size, 1) + 3 * c.hidden_size)
    between = 4 * (4 * c.hidden_size + 3 * heads + chosen) + c.vocab_size * c.dtype.itemsize
    return sum(rows) * c.vocab_size * 4 + max(rows) * between

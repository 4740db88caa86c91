"""Capture and replay on the CPU: a stand-in for CUDA graphs that is as strict as they are.

While it captures, each of torch's operations is written down with the tensors that it reads and
fills; a replay runs these again, and no Python of the engine's. So what Python knew at the capture
stays as it was, as in a graph. What is made in between belongs to the tape, and holds 0xDB before
each replay. What was there before is not kept alive: a replay that reads memory which is gone
fails. Whatever would make the host wait for a device is refused while it captures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITING_METHODS = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "bincount"),
    *("__bool__", "__int__", "__float__", "__index__", "equal"),
}
WAITING_OPERATIONS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
REFUSED = "{}: operation not permitted when stream is capturing"
POISON = 0xDB


class NoWaiting(TorchFunctionMode):
    """What doesn't reach torch's operations where the tensor is a CPU's."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITING_METHODS:
            raise RuntimeError(REFUSED.format(name))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Outside:
    """A tensor whose memory was there before the capture, and may go."""

    memory: StorageWeakRef
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Outside:
        memory = StorageWeakRef(x.untyped_storage())
        return cls(memory, x.shape, x.stride(), x.storage_offset(), x.dtype)

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        if storage is None:
            raise RuntimeError("a graph reads memory that is gone")
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class HostCall:
    """What a stream has the host do, at each replay and not when it is captured."""

    work: Callable[[], None]

    def run(self) -> None:
        self.work()


@dataclass(frozen=True)
class Operation:
    """One that is run again: what it makes is copied to where it was made first."""

    func: Any
    args: Any
    kwargs: Any
    made: tuple[Tensor, ...]  # none: it fills what it was given

    def run(self) -> None:
        args, kwargs = tree_map(_tensor, (self.args, self.kwargs))
        again = [x for x in tree_leaves(self.func(*args, **kwargs)) if isinstance(x, Tensor)]
        if self.made:
            for kept, new in zip(self.made, again, strict=True):
                kept.copy_(new)


class Tape(TorchDispatchMode):
    """The operations of one capture."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation | HostCall] = []
        self._mine: dict[int, torch.UntypedStorage] = {}  # kept, so that no address comes twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        masks = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in WAITING_OPERATIONS or masks:
            raise RuntimeError(REFUSED.format(name))
        before = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {each.untyped_storage()._cdata for each in before}
        with torch._C.DisableTorchFunction():
            result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        new = [x for x in made if x.untyped_storage()._cdata not in known]
        for each in new:
            self._mine[each.untyped_storage()._cdata] = each.untyped_storage()
        fills = any(
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        )
        assert not new or len(new) == len(made), f"{func}: some of what it makes is a view"
        if new or fills:
            kept = tree_map(self._kept, (args, kwargs))
            self.operations.append(Operation(func, *kept, made=tuple(new)))
        return result

    def replay(self) -> None:
        self.poison()
        for each in self.operations:
            each.run()

    def poison(self) -> None:
        """What lies in a graph's memory between two replays is nobody's."""
        for storage in self._mine.values():
            if storage.nbytes():
                torch.empty(0, dtype=torch.uint8).set_(storage).fill_(POISON)

    def _kept(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._mine:
            return Outside.of(x)
        return x


def _tensor(x: Any) -> Any:
    return x.tensor() if isinstance(x, Outside) else x


class TapeRecorder:
    """engine.graphs.Recorder."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.tape: Tape | None = None  # under way

    def capture(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.tape = tape = Tape()
        try:
            with NoWaiting(), tape:
                made = compute()
        finally:
            self.tape = None
        tape.poison()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, made


class TapeSideStream:
    """engine.graphs.SideStream, as late as it may be: nothing that was begun is done before `join`,
    and until then its targets hold 0xDB. `prompt`: as early as it may be, at once. Its clock goes
    on by a second a mark."""

    def __init__(self, recorder: TapeRecorder, *, prompt: bool = False) -> None:
        self._recorder = recorder
        self._prompt = prompt
        self._begun: list[Callable[[], object]] = []
        self._forked = False
        self._marks = 0
        self.host_calls = 0

    def fork(self) -> None:
        assert not self._begun, "what was begun was never joined"
        self._forked = True

    def copy(self, source: Tensor, target: Tensor) -> None:
        assert source.shape == target.shape
        assert source.dtype == target.dtype
        target.view(torch.uint8).fill_(POISON)
        self._begin(lambda: target.copy_(source))

    def call(self, work: Callable[[], None]) -> None:
        def called() -> None:
            self.host_calls += 1
            on_a_thread(work)

        if self._recorder.tape is not None:
            tape = self._recorder.tape
            self._begin(lambda: tape.operations.append(HostCall(called)))
        else:
            self._begin(called)

    def join(self) -> None:
        assert self._forked, "nothing was begun"
        for each in self._begun:
            each()
        self._begun, self._forked = [], False

    def wait(self) -> None:
        """What nobody has joined runs all the same."""
        for each in self._begun:
            each()
        self._begun, self._forked = [], False

    def mark(self) -> int | None:
        if self._recorder.tape is not None:
            return None
        self._marks += 1
        return self._marks

    def seconds(self, began: int, ended: int) -> float:
        """A second from one to the next: so many as times were measured."""
        assert not self._begun, "the host did not wait"
        return float(ended - began)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def _begin(self, what: Callable[[], object]) -> None:
        assert self._forked, "it follows nothing that the device was told"
        if self._prompt:
            what()
        else:
            self._begun.append(what)


def on_a_thread(work: Callable[[], None]) -> None:
    """As a driver calls the host: not on the thread that computes, whose modes don't hold there."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

"""The engine's kernels as Python sees them: products with weights, attention over pages.

An array is numpy's, C-contiguous: float32, or uint16 that holds bfloat16; all of one call's arrays
have the same type. Weights may be records instead (engine/quantised.py), uint8 [n, bytes of one]:
of experts only those that were chosen are looked at, and they are of one kind. A wrong dtype or
shape is a ValueError that names the argument. Calls release the GIL. A row's result has the same
bits whatever else is in the call, and however many threads.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]  # float32, uint16 that holds bfloat16, or uint8: records
I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]
F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]

def instruction_sets() -> list[str]:
    """Of portable, avx2, avx512, avx512_vnni, avx512_bf16, amx: those that this machine offers,
    plainest first; each includes the ones before it."""

class Workbench:
    """An instruction set, threads and scratch memory. Calls from several threads take turns."""

    def __init__(self, instruction_set: str, threads: int) -> None: ...

def linear(workbench: Workbench, x: Array, w: Array, y: Array, /) -> None:
    """y [tokens, out] = x [tokens, in] times w [out, in], or one record of it, transposed."""

class Gating:
    """What experts make of gate and up, gate not over `limit`, up between -limit and limit:

    silu        gate * sigmoid(alpha * gate) * (up + offset)
    gelu_tanh   gelu of gate in its tanh form * (up + offset)

    gate_up_bias [experts, 2 * size], gate first, is added before, down_bias [experts, hidden] to
    what an expert gives. Left out: silu(gate) * up, without biases."""

    def __init__(
        self,
        *,
        activation: str = "silu",
        alpha: float = 1.0,
        limit: float | None = None,
        offset: float = 0.0,
        gate_up_bias: F32 | None = None,
        down_bias: F32 | None = None,
    ) -> None: ...

def ffn(
    workbench: Workbench,
    x: Array,
    expert_ids: I64,
    weights: F32,
    gate_up: Array,
    down: Array,
    y: Array,
    /,
    *,
    gating: Gating = ...,
) -> None:
    """y[t] = sum over j of weights[t, j] * down_e (gating(gate_e x[t], up_e x[t])).

    x, y [tokens, hidden]; expert_ids, weights [tokens, k], e = expert_ids[t, j]; gate_up
    [experts, 2 * size, hidden], gate first; down [experts, hidden, size].
    """

def ffn_choices(
    workbench: Workbench,
    x: Array,
    expert_ids: I64,
    gate_up: Array,
    down: Array,
    outputs: F32,
    *,
    gating: Gating = ...,
) -> None:
    """outputs[t, j] = down_e (gating(gate_e x[t], up_e x[t])): what `ffn` sums, unweighed.

    outputs [tokens, k, hidden], float32. A choice whose id is -1 is somebody else's: its outputs
    are not touched, so that several callers may fill one array at a time, each with its workbench.
    """

def sum_choices(workbench: Workbench, outputs: F32, weights: F32, y: Array) -> None:
    """y[t] = sum over j of weights[t, j] * outputs[t, j], with the bits that `ffn` gives."""

def count_choices(expert_ids: I64, counts: F64) -> None:
    """Adds one to counts [experts] for each of expert_ids, of any shape. ValueError, and nothing is
    added, for an id that is none."""

class ChoiceRule:
    """How experts are chosen (engine/choice.py), with its biases, float32 [experts]: `bias` is
    added to the logits, `selection_bias` to the scores for the choice alone."""

    def __init__(
        self,
        experts_per_token: int,
        *,
        scoring: str = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        chosen_groups: int = 1,
        bias: F32 | None = None,
        selection_bias: F32 | None = None,
    ) -> None: ...

def choose(
    workbench: Workbench, rule: ChoiceRule, logits: Array, expert_ids: I64, weights: F32
) -> None:
    """The experts of each token, best first, and their weights [tokens, k], of logits [tokens,
    experts], up to 1024. NaN is chosen last."""

class Decoder:
    """What a step computes around its feed-forwards, a layer in a call. One step at a time, from
    one thread. cosines, sines [positions, head size / 2]. Keeps the arrays that it is given."""

    def __init__(
        self, workbench: Workbench, cosines: F32, sines: F32, *, query_heads: int, eps: float
    ) -> None: ...
    def add_layer(
        self,
        *,
        attention_norm: Array,
        qkv: Array,
        out: Array,
        feed_forward_norm: Array,
        key_pages: Array,
        value_pages: Array,
        query_norm: Array | None = None,
        key_norm: Array | None = None,
        router: Array | None = None,
        rule: ChoiceRule | None = None,
    ) -> None:
        """The next layer. qkv [(query heads + 2 * KV heads) * head size, hidden]; out [hidden,
        query heads * head size]; norms [hidden], of heads [head size]; router [experts, hidden];
        pages as in `attend`. The first one decides the shapes and the type of all."""

    def begin(
        self,
        positions: I64,
        query_lens: I32,
        context_lens: I32,
        block_tables: I32,
        page_ids: I64,
        offsets: I64,
        x: Array,
        normed: Array,
        expert_ids: I64,
        weights: F32,
    ) -> None:
        """A step: x [tokens, hidden] are the embeddings of its tokens, and become the residual.
        `run` fills normed [tokens, hidden], expert_ids and weights [tokens, k]."""

    def run(self, layer: int, add: Array | None = None) -> None:
        """Adds what the feed-forward of the layer before gave [tokens, hidden], attends, and leaves
        in `normed`, `expert_ids` and `weights` what this layer's feed-forward takes."""

    def finish(self, norm: Array, rows: I64, add: Array | None, normed: Array) -> None:
        """normed[i] = the last norm of token rows[i], which rise, after adding the last
        feed-forward's output."""

NO_TOKEN: int

def sample(
    workbench: Workbench,
    logits: F32,
    row_ids: I64,
    filters: NDArray[np.float64],
    streams: NDArray[np.uint64],
    tokens: I64,
) -> None:
    """tokens[i] of logits[row_ids[i]] [any, vocabulary], up to 2**24 tokens: the best one, or one
    drawn by the number `position` of the stream `seed`; NO_TOKEN where nan or +inf is among them,
    or nothing else than -inf. filters [rows, 4]: temperature (0: the best), top_k (0: all), top_p,
    min_p; streams [rows, 2]: seed, position. Of equal logits the lower id is the better one."""

def attend(
    workbench: Workbench,
    query: Array,
    key_pages: Array,
    value_pages: Array,
    query_lens: I32,
    context_lens: I32,
    block_tables: I32,
    output: Array,
    /,
    *,
    scale: float | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
    sinks: F32 | None = None,
) -> None:
    """Causal attention of query [tokens, query_heads, key_size], sequence after sequence, to output
    [tokens, query_heads, value_size].

    Pages [num_pages, kv_heads, page_size, key_size or value_size]; values may be a part of keys
    (`key_pages[..., :n]`). block_tables [sequences, max_pages]; a sequence's queries are the last
    query_lens of its context_lens tokens. scale: of scores, 1 / sqrt(key_size) where it is None.
    soft_cap c > 0: c * tanh(score / c). window w > 0: a query sees itself and w - 1 tokens before.
    sinks [query_heads]: a logit more in each softmax, without a value.
    """

def write(
    key: Array,
    value: Array,
    page_ids: I64,
    offsets: I64,
    key_pages: Array,
    value_pages: Array,
    /,
) -> None:
    """key_pages[page_ids[t], :, offsets[t]] = key[t], and so with values."""

"""The peer of a hit: transformers with a DynamicCache that its user kept, in memory or in a file.

Not a cache: it knows one prefix, matches nothing and verifies nothing. It shows what the compute of
the delta costs in transformers when the prefix's KV is simply there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class KeptCache:
    """A model in bf16 and, after `prime`, the KV of one prefix in memory and in `file`."""

    def __init__(self, model: Path, file: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self._file = file
        self._cache: Any = None

    def cold_s(self, tokens: Sequence[int]) -> float:
        """Seconds to the logits after the whole prompt, with nothing kept."""
        begin = time.perf_counter()
        self._forward(tokens, None)
        return time.perf_counter() - begin

    def prime(self, prefix: Sequence[int]) -> None:
        """Compute and keep the KV of `prefix`."""
        self._cache = self._forward(prefix, None)
        tensors = {}
        for number, layer in enumerate(self._cache.layers):
            tensors[f"{number}.keys"] = layer.keys.contiguous()
            tensors[f"{number}.values"] = layer.values.contiguous()
        save_file(tensors, self._file)
        with self._file.open("rb") as file:
            os.fsync(file.fileno())

    def memory_s(self, delta: Sequence[int]) -> float:
        """Seconds to the logits after prefix and `delta`. The kept KV is as before afterwards."""
        begin = time.perf_counter()
        self._forward(delta, self._cache)
        seconds = time.perf_counter() - begin
        self._cache.crop(-len(delta))  # a negative number: as many tokens less
        return seconds

    def file_s(self, delta: Sequence[int]) -> float:
        """As memory_s, with the KV read from the file, which is not in the page cache."""
        from transformers import DynamicCache

        with self._file.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        tensors = load_file(self._file)
        cache = DynamicCache()
        for number in range(len(tensors) // 2):
            cache.update(tensors[f"{number}.keys"], tensors[f"{number}.values"], number)
        self._forward(delta, cache)
        return time.perf_counter() - begin

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int], cache: Any) -> Any:
        ids = torch.tensor([list(tokens)])
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        int(output.logits[0, -1].argmax())  # the first token is what is waited for
        return output.past_key_values

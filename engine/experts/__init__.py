"""The mixture-of-experts layer: a router, and experts that run where they are placed.

`HybridExperts` is for other frameworks (README.md). It reads checkpoints, which stands on floors
above this one, so that nothing here depends on it and it is imported by name when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["HybridExperts"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("engine.models.expert_layers"), name)

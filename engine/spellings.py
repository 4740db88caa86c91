"""KTransformers' and SGLang's spellings of our flags: mapped, or refused with what to use.

Not responsible for what a value may be: that is our flag's (settings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvc2.errors import InvalidConfig

OURS = {
    "kt_num_gpu_experts": "num_gpu_experts",
    "kt_gpu_experts_ratio": "gpu_experts_ratio",
    "kt_expert_placement_strategy": "expert_placement_strategy",
    "kt_enable_dynamic_expert_update": "enable_dynamic_expert_update",
    "kt_gpu_prefill_token_threshold": "gpu_prefill_token_threshold",
    "kt_max_deferred_experts_per_token": "max_deferred_experts_per_token",
    "kt_threadpool_count": "expert_nodes",
    "kt_cpuinfer": "threads",
}
REFUSED = {
    "kt_method": "use --expert-dtype bf16, int8, int4 or fp8: of the CPU's and the device's",
    "kt_weight_path": "leave it out: the CPU's experts are read from --model too",
    "record_kt_gpu_expert_distribution": "use --expert-statistics FILE: choices are always counted",
    "expert_distribution_recorder_mode": "use --expert-statistics FILE: choices are always counted",
}


def arguments(given: Sequence[str]) -> list[str]:
    """A command line in our spellings. Raises InvalidConfig for what has none."""
    return [_argument(each) for each in given]


def _argument(text: str) -> str:
    name, equals, value = text.partition("=")
    if not name.startswith("--"):
        return text
    key = name[2:].replace("-", "_")
    _check(key, value or None)
    return f"--{OURS[key].replace('_', '-')}{equals}{value}" if key in OURS else text


def keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """A file's keys in our spellings. Raises InvalidConfig for what has none, and for a setting
    that is there twice."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        _check(key, value)
        ours = OURS.get(key, key)
        if ours in made or (ours != key and ours in values):
            raise InvalidConfig(key, value, f"is {ours}, which is there too")
        made[ours] = value
    return made


def _check(key: str, value: object) -> None:
    if key in REFUSED:
        raise InvalidConfig(key, value, REFUSED[key])

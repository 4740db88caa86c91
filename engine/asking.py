"""What commands ask a serving engine, and how they show it.

Not responsible for the answers: see http/.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from engine.errors import EngineError

TIMEOUT_S = 10.0


def ask(url: str, api_key: str, path: str, *, post: bool = False) -> dict[str, Any]:
    """The engine's answer. Raises EngineError: nobody is there, or it refuses."""
    if not url.startswith(("http://", "https://")):
        raise EngineError(f"url = {url!r}: http://HOST:PORT")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    data = b"" if post else None
    request = urllib.request.Request(f"{url.rstrip('/')}/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            told = json.load(answer)
    except urllib.error.HTTPError as error:
        raise EngineError(f"{url} refuses ({error.code}): {_reason(error)}") from error
    except (OSError, ValueError) as error:
        raise EngineError(f"{url} doesn't answer: {error}") from error
    if not isinstance(told, dict):
        raise EngineError(f"{url} is no engine: its answer is no JSON object")
    return told


def experts(told: dict[str, Any], *, as_json: bool) -> str:
    """`GET /experts` as a table, or as it came."""
    if as_json:
        return json.dumps(told)
    total = told["layers"] * told["experts"]
    lines = [f"{told['activations']:,} activations of {told['experts']} experts a layer"]
    if not told["placed"]:
        return "\n".join([*lines, "all experts are on the device"])
    size = told["hot"] * told["expert_bytes"] / 1e9
    lines += [
        f"{told['hot']} of {total} are hot ({size:.2f} GB), and serve {told['device_share']:.1%}",
        f"{told['exchanges']} exchanges, {told['failed_copies']} failed copies",
    ]
    if "prefill" in told:
        lines.append(_prefill(told["prefill"]))
    lines += _budget(told.get("budget", {}))
    lines += _host_budget(told.get("host_budget", {}))
    lines.append("layer  hot  served by the device")
    lines += [
        f"{each['layer']:5}  {len(each['hot']):3}  {each['device_share']:.1%}"
        for each in told["by_layer"]
    ]
    return "\n".join(lines)


def _budget(told: dict[str, Any]) -> list[str]:
    if not told:
        return []
    now, another, lines = told["now"], told["another_gb"], []
    lines.append(f"KV has {now['kv_gb']} GB, experts {now['experts_gb']} GB, {now['by']}")
    better = told.get("better")
    if better is not None and better["hot"] != now["hot"]:
        lines.append(
            f"the next start would give KV {better['kv_gb']} GB, experts {better['experts_gb']} GB"
        )
    more = f"another GB would bring {another['activations']:+.1%} of activations"
    return [*lines, more + (f", or {another['hits']:+.1%} of hits" if "hits" in another else "")]


def _host_budget(told: dict[str, Any]) -> list[str]:
    if not told:
        return []
    now, goal, another = told["now"], told["goal"], told["another_gb"]
    line = f"of {told['host_memory_gb']} GB of host memory KV has {now['kv_gb']} GB, "
    lines = [line + f"{now['experts']} experts {now['experts_gb']} GB, {now['by']}"]
    if goal["experts"] != now["experts"]:
        lines.append(f"it moves towards {goal['kv_gb']} GB and {goal['experts_gb']} GB")
    more = f"another GB of it would bring {another['needed']:+.1%} of what layers need"
    return [*lines, more + (f", or {another['hits']:+.1%} of hits" if "hits" in another else "")]


def _prefill(told: dict[str, Any]) -> str:
    pays = told["pays_from_tokens"]
    return (
        f"steps of {told['from_tokens']} tokens and more on the device: {told['copied']:,} experts "
        f"copied, {told['copy_ms']} ms each; measured to pay from "
        f"{'(not known yet)' if pays is None else pays} tokens on"
    )


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)

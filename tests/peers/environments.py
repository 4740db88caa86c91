"""The environments of the other engines, of a router and of a client, below build/peers: one for
each, made when a test first asks for it. KVC2_PEERS_NAME names a python in the place of one, which
has all that it would have."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from benchmarks.connectors import vllm_with_kvc2
from benchmarks.disk_peers import environment
from benchmarks.lmcache_peer import lmcache_over
from benchmarks.second_levels import sglang_over
from tests import ROOT

PEERS = ROOT / "build/peers"

# its indexer is native code; of the rest of its Python only the imports are wanted
DYNAMO = ["ai-dynamo-runtime==1.6.1"]

# its native code is for a process of its own; 46 MB
MOONCAKE = ["mooncake-transfer-engine-non-cuda==0.3.13.post1"]

# 330 MB, most of it what it knows of AWS
MOTO = ["moto[server]==5.2.5"]

# 3 GB, most of it torch for searches in documents
OPEN_WEBUI = ["open-webui==0.12.4", "torch==2.13.0"]


def given(name: str) -> Path | None:
    """The python that the environment names."""
    found = os.environ.get(f"KVC2_PEERS_{name}")
    return Path(found) if found else None


@functools.cache
def vllm_python() -> Path:
    """With vLLM for the CPU and this tree's kvc2 as it is now; 3 GB."""
    return given("VLLM") or vllm_with_kvc2(PEERS)


@functools.cache
def lmcache_python() -> Path:
    """With LMCache, over vLLM's, where kvc2 is too."""
    return given("LMCACHE") or lmcache_over(PEERS, vllm_python())


@functools.cache
def sglang_python() -> Path:
    """With SGLang, over vLLM's, where kvc2 is too."""
    return given("SGLANG") or sglang_over(PEERS, vllm_python())


@functools.cache
def dynamo_python() -> Path:
    """With Dynamo's runtime alone."""
    return given("DYNAMO") or environment(PEERS / "dynamo", DYNAMO, [])


@functools.cache
def mooncake_python() -> Path:
    """With Mooncake Store."""
    return given("MOONCAKE") or environment(PEERS / "mooncake", MOONCAKE, [])


@functools.cache
def moto_python() -> Path:
    """With moto's server, which plays S3."""
    return given("MOTO") or environment(PEERS / "moto", MOTO, [])


@functools.cache
def open_webui_python() -> Path:
    return given("OPEN_WEBUI") or environment(PEERS / "open-webui", OPEN_WEBUI, [])

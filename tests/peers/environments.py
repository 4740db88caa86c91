"""The environments of the other engines, of a router and of a client, below build/peers."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.connectors import install_kvc2
from benchmarks.disk_peers import LMCACHE, UNWANTED, VLLM, environment
from tests import ROOT

# beside vLLM, which brings torch and most of what else it imports
SGLANG = ["sglang==0.5.23", "orjson", "IPython", "traitlets", "gguf"]

# its indexer is native code; of the rest of its Python only the imports are wanted
DYNAMO = ["ai-dynamo-runtime==1.6.1"]

# its native code is for a process of its own; 46 MB
MOONCAKE = ["mooncake-transfer-engine-non-cuda==0.3.13.post1"]

# 330 MB, most of it what it knows of AWS
MOTO = ["moto[server]==5.2.5"]

# 3 GB, most of it torch for searches in documents
OPEN_WEBUI = ["open-webui==0.12.4", "torch==2.13.0"]


def dynamo_python() -> Path:
    """The python of an environment with Dynamo's runtime alone. KVC2_PEERS_DYNAMO names one."""
    if given := os.environ.get("KVC2_PEERS_DYNAMO"):
        return Path(given)
    return environment(ROOT / "build/peers/dynamo", DYNAMO, [])


def mooncake_python() -> Path:
    """The python of an environment with Mooncake Store. KVC2_PEERS_MOONCAKE names one."""
    if given := os.environ.get("KVC2_PEERS_MOONCAKE"):
        return Path(given)
    return environment(ROOT / "build/peers/mooncake", MOONCAKE, [])


def moto_python() -> Path:
    """The python of an environment with moto's server, which plays S3. KVC2_PEERS_MOTO names
    one."""
    if given := os.environ.get("KVC2_PEERS_MOTO"):
        return Path(given)
    return environment(ROOT / "build/peers/moto", MOTO, [])


def open_webui_python() -> Path:
    """The python of an environment with Open WebUI. KVC2_PEERS_OPEN_WEBUI names one."""
    if given := os.environ.get("KVC2_PEERS_OPEN_WEBUI"):
        return Path(given)
    return environment(ROOT / "build/peers/open-webui", OPEN_WEBUI, [])


def peers_python() -> Path:
    """The python of an environment with vLLM, LMCache, SGLang, and this tree's kvc2 as it is now.
    KVC2_PEERS_PYTHON names one that has all of it already."""
    if given := os.environ.get("KVC2_PEERS_PYTHON"):
        return Path(given)
    venvs = ROOT / "build/peers"
    python = environment(venvs / "all", VLLM, UNWANTED, [*LMCACHE, *SGLANG])
    install_kvc2(python, venvs / "wheels")
    return python

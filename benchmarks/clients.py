"""Latency as clients see it, and what one client's refused body costs another one's stream.

Kept connections and streams of the engine's HTTP, the daemon's gRPC on a unix socket and a TCP port
and its /metrics, each beside the bare round trip of a socket. Bodies of up to 8 MB that are refused
are sent while another client's stream runs: the longest pause between two of its pieces, beside the
longest one of the same stream before, and what the refusal took in time and memory.

Part of rpc.py, which starts it.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import report
from benchmarks.processes import Daemon, Engine, ProcessError, free_port
from kvc2.client.channel import Channel
from kvc2.host.address import Address

CALLS = 100  # in a repeat; a sample is their median
STREAM_TOKENS = 64
CALM_PIECES = 40  # of the bystander, before a body is sent and after it was refused
BYSTANDER_TOKENS = 1500
ANSWER_TIMEOUT_S = 300.0
TEXT = "The quick brown fox jumps over the lazy dog. "  # 7.8 MB of it is refused by its length
LONG_TEXT = TEXT * (7_800_000 // len(TEXT))


@dataclass(frozen=True)
class Case:
    """A body that must be refused, sent `copies` times at once."""

    name: str
    path: str
    body: bytes
    copies: int = 1


def refused_bodies(model: str) -> list[Case]:
    completions, chat = "/v1/completions", "/v1/chat/completions"
    head = json.dumps({"model": model})[:-1].encode()
    text = json.dumps({"model": model, "prompt": LONG_TEXT}).encode()
    messages = b'{"role":"user"},' * 400_000
    unknown = b",".join(b'"field%d":0' % number for number in range(500_000))
    return [
        Case("text_7.8_mb", completions, text),
        Case("fractions", completions, head + b',"prompt":[' + b"1.5," * 1_900_000 + b"1.5]}"),
        Case("empty_messages", chat, head + b',"messages":[' + messages[:-1] + b"]}"),
        Case("empty_mappings", chat, head + b',"messages":[' + b"{}," * 1_000_000 + b"{}]}"),
        Case("unknown_names", completions, head + b',"prompt":"a",' + unknown + b"}"),
        Case("text_7.8_mb_twelve", completions, text, copies=12),
    ]


class Kept:
    """One kept connection to an HTTP server on 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)

    def get(self, path: str) -> None:
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        response.read()
        if response.status != 200:
            raise ProcessError(f"GET {path}: {response.status}")

    def post(self, path: str, body: bytes) -> http.client.HTTPResponse:
        self._connection.request("POST", path, body, {"Content-Type": "application/json"})
        return self._connection.getresponse()

    def stream(self, model: str, max_tokens: int) -> Iterator[float]:
        """When each piece of a stream came, by perf_counter."""
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": max_tokens}
        body |= {"ignore_eos": True, "stream": True, "temperature": 0}
        response = self.post("/v1/completions", json.dumps(body).encode())
        while line := response.readline():
            if line.startswith(b"data: {"):
                yield time.perf_counter()

    def close(self) -> None:
        self._connection.close()


def median_ms(call: Callable[[], object]) -> float:
    """Of CALLS calls."""
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def once(port: int, path: str) -> None:
    """One request on a connection of its own."""
    kept = Kept(port)
    kept.get(path)
    kept.close()


@contextmanager
def echo() -> Iterator[Callable[[], object]]:
    """A round trip of one byte to a thread over TCP: what no server on this machine is below."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for each in (ours, theirs):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def answer() -> None:
        while data := theirs.recv(1):
            theirs.sendall(data)

    threading.Thread(target=answer, daemon=True).start()

    def call() -> object:
        ours.sendall(b"x")
        return ours.recv(1)

    with ours, theirs:
        yield call
        ours.shutdown(socket.SHUT_RDWR)


@dataclass
class Samples:
    """Milliseconds by case, in the order of the cases, and of the bare round trip."""

    by_case: dict[str, list[float]] = field(default_factory=dict)
    bare: list[float] = field(default_factory=list)

    def add(self, case: str, value: float) -> None:
        self.by_case.setdefault(case, []).append(value)

    def rows(self) -> list[report.Row]:
        limit = {"limit": statistics.median(self.bare), "limit_name": "a byte to and fro"}
        return [
            report.row(name, "ms", "lower", values, **limit)
            for name, values in self.by_case.items()
        ]


def latency_rows(engine: Engine, model: str, folder: Path, repeats: int) -> list[report.Row]:
    """Every way in, by turns."""
    samples, metrics_port = Samples(), free_port()
    places = {name: folder / name for name in ("unix", "tcp")}
    for place in places.values():
        place.mkdir()
    tcp = f"127.0.0.1:{free_port()}"
    daemons = [
        Daemon(places["unix"], cpu_gb=0.1, disk_gb=0.1, metrics_port=metrics_port),
        Daemon(places["tcp"], cpu_gb=0.1, disk_gb=0.1, listen=tcp),
    ]
    kept = Kept(engine.port)
    try:
        for each in daemons:
            each.wait_ready()
        channels = [Channel(Address.of_daemon(each.address)) for each in daemons]
        with echo() as bare:
            for _ in range(repeats):
                samples.bare.append(median_ms(bare))
                samples.add("http_health_kept", median_ms(lambda: kept.get("/health")))
                samples.add("http_health_new", median_ms(lambda: once(engine.port, "/health")))
                _add_stream(samples, kept, model)
                for name, channel in zip(("unix", "tcp"), channels, strict=True):
                    call = lambda channel=channel: channel.serves(5.0)  # noqa: E731
                    samples.add(f"grpc_health_{name}", median_ms(call))
                samples.add("daemon_metrics", median_ms(lambda: once(metrics_port, "/metrics")))
        for channel in channels:
            channel.close()
    finally:
        kept.close()
        for each in daemons:
            each.stop()
    return samples.rows()


def _add_stream(samples: Samples, kept: Kept, model: str) -> None:
    begin = time.perf_counter()
    times = list(kept.stream(model, STREAM_TOKENS))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    samples.add("stream_first_piece", (times[0] - begin) * 1e3)
    samples.add("stream_between_pieces", statistics.median(gaps) * 1e3)
    samples.add("stream_longest_pause", max(gaps) * 1e3)


@dataclass(frozen=True)
class Refusal:
    """Milliseconds but for `memory_mib`, which is what the engine's peak was above before."""

    calm: float  # the stream's longest pause before
    pause: float  # and while the body was refused
    health: float  # the longest GET /health meanwhile
    took: float
    memory_mib: float


def refusal_rows(engine: Engine, model: str, repeats: int) -> list[report.Row]:
    rows = []
    for case in refused_bodies(model):
        found = [refuse(engine, model, case) for _ in range(repeats)]
        calm = statistics.median(each.calm for each in found)
        health = statistics.median(each.health for each in found)
        peers = {"undisturbed": calm, "longest /health": health}
        name = f"refused_{case.name}"
        pauses = [each.pause for each in found]
        rows.append(report.row(f"{name}_pause", "ms", "lower", pauses, peers=peers, goal="< 250"))
        rows.append(report.row(f"{name}_took", "ms", "lower", [each.took for each in found]))
        memory = [each.memory_mib for each in found]
        rows.append(report.row(f"{name}_memory", "MiB", "lower", memory))
    return rows


def refuse(engine: Engine, model: str, case: Case) -> Refusal:
    """One measurement beside a bystander. ProcessError if the body is not refused."""
    bystander, times, ended = Kept(engine.port), [], threading.Event()

    def listen() -> None:
        while not ended.is_set():
            for when in bystander.stream(model, BYSTANDER_TOKENS):
                times.append(when)
                if ended.is_set():
                    return

    def more(count: int) -> None:
        wanted = len(times) + count
        engine.wait_until(lambda: len(times) >= wanted, "pieces of the bystander")

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        more(CALM_PIECES)
        health = Healths(engine.port)
        before = _reset_peak(engine.child.pid)
        first = len(times)
        begin = time.perf_counter()
        with ThreadPoolExecutor(case.copies) as pool:
            list(pool.map(lambda _: _post_refused(engine, case), range(case.copies)))
        took = time.perf_counter() - begin
        longest_health = health.stop()
        more(CALM_PIECES)
    finally:
        ended.set()
        thread.join(ANSWER_TIMEOUT_S)
        bystander.close()
    memory = (_memory(engine.child.pid, "VmHWM") - before) / 2**20
    calm, pause = longest(times[:first]), longest(times[first - 1 :])
    return Refusal(calm * 1e3, pause * 1e3, longest_health * 1e3, took * 1e3, memory)


def longest(times: Sequence[float]) -> float:
    """The longest pause between two pieces. Streams follow each other: an answer's first piece
    waits for its prompt, of four words."""
    return max(after - before for before, after in itertools.pairwise(times))


class Healths:
    """Asks for /health again and again until `stop`, which tells the longest time it took."""

    def __init__(self, port: int) -> None:
        self._kept = Kept(port)
        self._longest = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._ended.wait(0.01):
            begin = time.perf_counter()
            self._kept.get("/health")
            self._longest = max(self._longest, time.perf_counter() - begin)

    def stop(self) -> float:
        self._ended.set()
        self._thread.join(ANSWER_TIMEOUT_S)
        self._kept.close()
        return self._longest


def _post_refused(engine: Engine, case: Case) -> None:
    kept = Kept(engine.port)
    response = kept.post(case.path, case.body)
    text = response.read()
    kept.close()
    if not 400 <= response.status < 500:
        raise ProcessError(f"{case.name}: {response.status} {text[:200]!r}\n{engine.tail()}")


def _memory(pid: int, name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def _reset_peak(pid: int) -> int:
    """The peak begins anew; the memory of now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _memory(pid, "VmRSS")


def rows(model: Path, folder: Path, repeats: int) -> list[report.Row]:
    """All of them, over one engine without a cache."""
    engine = Engine("engine", model, folder)
    try:
        engine.wait_ready()
        name = model.resolve().name
        found = latency_rows(engine, name, folder, repeats)
        return found + refusal_rows(engine, name, repeats)
    finally:
        engine.stop()

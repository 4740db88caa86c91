"""vLLM's tier by its contract, with stand-ins of its classes and of the manager that calls it: one
step after the other, lookups that are asked again, jobs that end later."""

from __future__ import annotations

import importlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvc2.client import Admin
from kvc2.errors import InvalidConfig, InvalidRequest
from kvc2.integrations.vllm import tier as module
from kvc2.integrations.vllm.tier import PATIENCE_S, Known, identity_of
from tests.doubles.daemons import ServedDaemon, serve_config

WAIT_S = 20.0
CHUNKS, CHUNK_BYTES = 24, 5000
KEYS = [bytes([each]) * 36 for each in range(10)]  # a block's hash and a group


class Result(Enum):
    """What a lookup answers."""

    MISS = 0
    HIT = 1
    HIT_PENDING = 2
    RETRY = 3


@dataclass
class Done:
    """How a job ended."""

    job_id: int
    success: bool
    successful_keys: Any = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


class Base:
    """What vLLM calls of a tier must be there, beside what the base class has."""

    def __init__(self, spec: Any, view: memoryview, tier_type: str, detector: Any) -> None:
        called = ("lookup", "submit_store", "submit_load", "get_finished_jobs", "on_new_request")
        called += ("on_request_finished", "on_schedule_end", "drain_jobs", "shutdown")
        assert all(callable(getattr(self, name)) for name in called)
        assert view.strides is not None
        self.block_size_bytes = view.strides[0]


@dataclass
class Job:
    job_id: int
    keys: list[bytes]
    chunk_ids: Any
    is_promotion: bool
    req_context: Any


PARALLEL = {"tp_size": 1, "pp_size": 1, "pcp_size": 1, "dcp_size": 1}


def config(**changes: Any) -> Any:
    """vLLM's OffloadingConfig, as far as it is read."""
    agnostic = changes.pop("is_parallelism_agnostic", False)
    of_parallel = {name: changes.pop(name, size) for name, size in PARALLEL.items()}
    named = {
        "groups": (SimpleNamespace(tokens_per_block=16, layer_names=("a", "b")),),
        "model": SimpleNamespace(name="model", dtype="bfloat16"),
        "cache": SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1),
        "parallel": SimpleNamespace(is_parallelism_agnostic=agnostic, **of_parallel),
        "kv_cache_layout": None,
        "canonical_layout": False,
        "replicated_layout": False,
    }
    return SimpleNamespace(**{**named, **changes})


class Engine:
    """A primary tier of CHUNKS rows and the steps of a scheduler: what its manager does."""

    def __init__(self, tier_class: Any, where: str, seed: int, **settings: Any) -> None:
        random = np.random.default_rng(seed)
        self.rows = random.integers(0, 256, (CHUNKS, CHUNK_BYTES), np.uint8)
        self.view = memoryview(self.rows)
        spec, given = SimpleNamespace(config=config()), {"weights": "w", "address": where}
        self.tier = tier_class(
            spec, self.view, "Kvc2Tier", backpressure_detector=None, **{**given, **settings}
        )
        self._numbers, self._names = itertools.count(), itertools.count()
        self.jobs: dict[int, Job] = {}

    def request(self) -> Any:
        context = SimpleNamespace(req_id=f"r{next(self._names)}")
        assert self.tier.on_new_request(context) is not None
        return context

    def store(self, keys: list[bytes], chunks: list[int]) -> Done:
        job = self._job(keys, chunks, promotes=False, context=self.request())
        self.tier.submit_store(job)
        self.tier.on_request_finished(job.req_context)  # before its jobs have ended
        return self.ended(job)

    def load(self, keys: list[bytes], chunks: list[int], context: Any) -> Done:
        """What a lookup has found."""
        job = self._job(keys, chunks, promotes=True, context=context)
        self.tier.submit_load(job)
        return self.ended(job)

    def _job(self, keys: list[bytes], chunks: list[int], *, promotes: bool, context: Any) -> Job:
        number = next(self._numbers)
        self.jobs[number] = Job(number, keys, np.array(chunks, np.int32), promotes, context)
        return self.jobs[number]

    def ended(self, job: Job) -> Done:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            for done in self.tier.get_finished_jobs():
                of = self.jobs.pop(done.job_id)  # each once, and none that is unknown
                assert set(done.successful_keys or ()) <= set(of.keys)
                assert done.success is (len(done.successful_keys or ()) == len(of.keys))
                if of is job:
                    return done
            self.step()
        raise AssertionError("the job never ended")

    def step(self) -> None:
        self.tier.on_schedule_end(None)
        time.sleep(0.001)

    def found(self, keys: list[bytes], context: Any) -> list[bool]:
        """Asked in each step, until all are known."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            told = [self.tier.lookup(key, context) for key in keys]
            if Result.RETRY not in told:
                return [each is Result.HIT for each in told]
            self.step()
        raise AssertionError("never answered")


@pytest.fixture
def tier_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stand_ins: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.v1": {},
        "vllm.v1.kv_offload": {},
        "vllm.v1.kv_offload.base": {
            "LookupResult": Result,
            "RequestOffloadingContext": SimpleNamespace,
        },
        "vllm.v1.kv_offload.tiering": {},
        "vllm.v1.kv_offload.tiering.base": {"JobResult": Done, "SecondaryTierManager": Base},
    }
    for name, has in stand_ins.items():
        stand_in = ModuleType(name)
        vars(stand_in).update(has)
        monkeypatch.setitem(sys.modules, name, stand_in)
    importlib.reload(module)
    monkeypatch.setattr(module, "check_version", lambda: None)
    monkeypatch.setattr(module, "version_of_vllm", lambda: "0.32.0")
    yield module.Kvc2Tier
    monkeypatch.undo()
    importlib.reload(module)


Opened = Callable[..., Engine]


@pytest.fixture
def opened(tier_class: Any, tmp_path: Path) -> Iterator[Opened]:
    """Engines over a daemon with a disk."""
    with (
        ServedDaemon(serve_config(tmp_path, disk=True), cache=None) as served,
        ExitStack() as stack,
    ):

        def make(seed: int, **settings: Any) -> Engine:
            engine = Engine(tier_class, served.address, seed, **settings)
            stack.callback(engine.tier.shutdown)
            assert engine.tier._objects.client.wait_attached(WAIT_S)
            return engine

        yield make


@pytest.mark.parametrize("dropped", [(), ("cpu",)])
def test_chunks_of_one_engine_are_loaded_by_another(
    opened: Opened, tmp_path: Path, dropped: tuple[str, ...]
) -> None:
    first, second = opened(1), opened(2)
    assert first.store(KEYS[:4], [5, 0, 7, 3]).success
    for each in dropped:
        admin = Admin(f"unix:{tmp_path / 'kvc2.sock'}")
        assert not any(admin.flush(20).not_durable_blocks.values())
        admin.evict(each)
    context, before = second.request(), second.rows.copy()
    assert second.found([*KEYS[:4], KEYS[9]], context) == [True] * 4 + [False]
    done = second.load(KEYS[:4], [2, 9, 11, 1], context)
    assert (done.success, done.transfer_bytes) == (True, 4 * CHUNK_BYTES)
    before[[2, 9, 11, 1]] = first.rows[[5, 0, 7, 3]]
    np.testing.assert_array_equal(second.rows, before)


def test_others_weights_are_other_chunks(opened: Opened) -> None:
    first, other = opened(1), opened(2, weights="others")
    assert first.store(KEYS[:2], [0, 1]).success
    assert other.found(KEYS[:2], other.request()) == [False, False]


def test_what_went_between_lookup_and_load_is_missing_and_the_rest_comes(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opened(1), opened(2)
    assert first.store(KEYS[:3], [0, 1, 2]).success
    context, other = second.request(), second.request()
    asked = [*KEYS[:3], KEYS[8]]
    objects = second.tier._objects
    with monkeypatch.context() as eviction:
        eviction.setattr(objects, "exists", lambda names: np.ones(len(names), bool))
        assert second.found(asked, context) == [True] * 4
    done = second.load(asked, [4, 5, 6, 7], context)
    assert (done.success, list(done.successful_keys)) == (False, KEYS[:3])
    np.testing.assert_array_equal(second.rows[4:7], first.rows[:3])
    assert second.found(asked, context) == [True] * 3 + [False]  # it is not tried again
    second.tier.on_request_finished(context)
    assert first.store(KEYS[8:9], [3]).success
    assert second.found(asked, other) == [True] * 4


def test_a_scheduler_never_waits_and_asks_a_step_s_keys_at_once(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's answer comes when it comes."""
    engine, answer, asked = opened(1), threading.Event(), []

    def exists(names: list[bytes]) -> Any:
        asked.append(len(names))
        assert answer.wait(WAIT_S)
        return np.zeros(len(names), bool)

    monkeypatch.setattr(engine.tier._objects, "exists", exists)
    context = engine.request()
    for _ in range(3):
        assert {engine.tier.lookup(key, context) for key in KEYS} == {Result.RETRY}
        engine.step()
    answer.set()
    assert engine.found(KEYS, context) == [False] * len(KEYS)
    assert asked == [len(KEYS)]


def test_jobs_that_were_drained_have_ended(opened: Opened) -> None:
    engine = opened(1)
    jobs = [engine._job([key], [at], promotes=False, context=None) for at, key in enumerate(KEYS)]
    for job in jobs:
        engine.tier.submit_store(job)
    engine.tier.drain_jobs()
    assert sorted(done.job_id for done in engine.tier.get_finished_jobs()) == [
        job.job_id for job in jobs
    ]


def test_after_a_shutdown_vllms_memory_is_its_own(tier_class: Any, tmp_path: Path) -> None:
    with ServedDaemon(serve_config(tmp_path), cache=None) as served:
        engine = Engine(tier_class, served.address, 1)
        assert engine.tier._objects.client.wait_attached(WAIT_S)
        assert engine.store(KEYS[:2], [0, 1]).success
        engine.tier.shutdown()
        engine.view.release()  # BufferError while an array lies over it


def test_without_a_daemon_all_is_a_miss_and_nothing_raises(tier_class: Any, tmp_path: Path) -> None:
    engine = Engine(tier_class, f"unix:{tmp_path}/none", 1)
    context = engine.request()
    assert engine.found(KEYS[:2], context) == [False, False]
    assert not engine.store(KEYS[:2], [0, 1]).success
    done = engine.load(KEYS[:2], [0, 1], context)
    assert (done.success, done.successful_keys) == (False, None)
    engine.tier.shutdown()


def test_an_answer_is_kept_as_long_as_someone_has_asked_for_it() -> None:
    known = Known()
    assert known.ask(b"k", "a", 0.0) is None
    assert known.ask(b"k", "b", 0.0) is None
    assert known.to_ask() == [b"k"]
    assert known.to_ask() == []
    known.answers.put([(b"k", True)])
    assert known.ask(b"k", "a", 0.0) is True
    known.forget("a")
    assert known.ask(b"k", "b", 0.0) is True
    known.forget("b")
    known.forget("b")
    assert known.ask(b"k", "c", 0.0) is None  # it may be gone by now
    assert known.to_ask() == [b"k"]


def test_what_is_forgotten_before_it_was_asked_is_not_asked() -> None:
    known = Known()
    known.ask(b"k", "a", 0.0)
    known.forget("a")
    assert known.to_ask() == []
    known.answers.put([(b"k", True)])
    known.miss([b"k"])
    assert known.ask(b"k", "b", 0.0) is None


def test_patience_ends() -> None:
    known = Known()
    assert known.ask(b"k", "a", 10.0) is None
    assert known.ask(b"k", "a", 10.0 + PATIENCE_S) is None
    assert known.ask(b"k", "a", 10.1 + PATIENCE_S) is False
    known.answers.put([(b"k", True)])
    assert known.ask(b"k", "a", 11.0 + PATIENCE_S) is True


def test_whatever_changes_a_byte_of_a_chunk_is_in_the_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "version_of_vllm", lambda: "0.32.0")
    same = identity_of(config(), 4096, "w")
    assert identity_of(config(), 4096, "w") == same
    group = SimpleNamespace(tokens_per_block=16, layer_names=("a", "c"))
    changes: list[dict[str, Any]] = [
        *({name: 2} for name in PARALLEL),
        {"groups": (group,)},
        {"model": SimpleNamespace(name="model", dtype="fp8")},
        {"cache": SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=2)},
        {"kv_cache_layout": "NHD"},
        {"canonical_layout": True},
    ]
    others = [identity_of(config(**each), 4096, "w") for each in changes]
    others += [identity_of(config(), 8192, "w"), identity_of(config(), 4096, "v")]
    monkeypatch.setattr(module, "version_of_vllm", lambda: "0.33.0")
    others.append(identity_of(config(), 4096, "w"))
    assert len({same, *others}) == len(others) + 1


def test_where_bytes_are_the_same_in_any_parallel_shape_they_are_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "version_of_vllm", lambda: "0.32.0")
    for named in ("is_parallelism_agnostic", "replicated_layout"):
        told = {identity_of(config(tp_size=n, **{named: True}), 4096, "w") for n in (1, 2)}
        assert len(told) == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"address": "here"}, "secondary_tiers.address"),
        ({"address": 5}, "secondary_tiers.address"),
        ({"adress": "unix:/s"}, "secondary_tiers.adress"),
        ({"weights": 5}, "secondary_tiers.weights"),
    ],
)
def test_an_unknown_or_odd_setting_is_named(
    tier_class: Any, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises((InvalidConfig, InvalidRequest), match=named):
        Engine(tier_class, "unix:/none", 1, **settings)


def test_it_can_be_imported_without_vllm() -> None:
    assert importlib.import_module("kvc2.integrations.vllm.tier").Kvc2Tier

"""Decides what each step computes: first come, first served, continuous batching, chunked prefill.

Laws: a chunk ends at a multiple of its size counted from token 0, or at the prompt's end. The size
is chunk_size, in a step that decodes too what fits beside decodes (rate.MixedSteps), and no more is
prefilled there, so that a long prompt doesn't hold up what others read. Decodes go first, then
prefills by their tenants' turns (turns) and arrival, within the token budget. A prompt whose next
tokens another request computes now waits for those commits, for a bounded time, and then hits them.
Not responsible for whose pages go when they run out (running), what a request is told (delivery),
the daemon (prefix), the thread (worker), or HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.admission import Admission
from engine.batch import Batch, Slice
from engine.delivery import Delivery
from engine.metrics import EngineMetrics
from engine.prefix import Bridge, Lease, PrefixLostError
from engine.rate import MixedSteps, PrefillRate
from engine.request import Output, Request
from engine.running import Running
from engine.sampler import Sampler
from engine.scores import apart, last_rows, score_prompts
from engine.sequence import Sequence

log = logging.getLogger(__name__)


class Compute(Protocol):
    """engine.runner.Runner, as the scheduler uses it."""

    def step(self, batch: Batch, layer_ready: Callable[[int], None] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class SchedulerConfig:
    """`token_budget`: tokens a step computes at most. `mixed_chunk_size`: tokens that a step with
    decodes prefills at most, `mixed_step_stretch`: how many times as long as without them it may
    take. `starve_s`: how long a request that is alone may wait for pages that a
    silent daemon holds, before it fails."""

    chunk_size: int
    token_budget: int
    max_running: int
    mixed_chunk_size: int = 256
    mixed_step_stretch: float = 2.5
    starve_s: float = 30.0


@dataclass(frozen=True)
class Work:
    """`count` tokens of a sequence, from its `computed` on."""

    sequence: Sequence
    count: int

    @property
    def num_logits(self) -> int:
        """Rows of logits that it gets; before it is computed."""
        return self.sequence.logits_wanted(self.count)


class Scheduler:
    """One thread calls all of it. `clock` is monotonic seconds."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        bridge: Bridge,
        compute: Compute,
        metrics: EngineMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self.bridge = bridge
        rate, most = PrefillRate(config.chunk_size, self._tell_rate), config.mixed_chunk_size
        self._mixed = MixedSteps(config.mixed_step_stretch, most, rate)
        self._compute = compute
        self._sampler = Sampler()
        self._delivery = Delivery(bridge=bridge, metrics=metrics, clock=clock)
        self._metrics = metrics
        self._clock = clock
        self._order = 0
        self._admission = Admission(
            bridge=bridge, max_running=config.max_running, metrics=metrics, clock=clock
        )
        self.running = Running(
            self._admission.put,
            bridge=bridge,
            metrics=metrics,
            clock=clock,
            starve_s=config.starve_s,
        )
        self._by_id: dict[str, Sequence] = {}

    # what comes in

    def add(self, request: Request, arrived: float | None = None) -> None:
        """Queue a request that fits (see http: what can never fit is refused there)."""
        self._order += 1
        at = self._clock() if arrived is None else arrived
        sequence = Sequence.of(request, self._order, at, self.bridge.config.page_size)
        self._by_id[request.request_id] = sequence
        self._admission.put(sequence)

    def cancel(self, request_id: str) -> None:
        """The caller is gone. Frees all it holds; nothing more is delivered. Unknown: no change."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._remove(sequence)
            self._metrics.requests.labels("cancelled").inc()

    def fail_all(self, error: str) -> None:
        """End every request with an error: each is answered, in whatever state the rest is."""
        for sequence in list(self._by_id.values()):
            try:
                self._finish(sequence, "error", error, unavailable=True)
            except Exception:  # after a bug nothing of the scheduler can be relied on
                log.exception("what %s holds can't be freed", sequence.request.request_id)
                sequence.request.deliver(Output(finish="error", error=error, unavailable=True))

    # one step

    @property
    def prefill_rate(self) -> float | None:
        """Tokens/s; None: nothing was measured yet."""
        return self._mixed.rate.tokens_per_s

    @property
    def requests(self) -> int:
        """Requests that have not ended."""
        return len(self._by_id)

    @property
    def idle(self) -> bool:
        """No request is there at all."""
        return not self.running and not len(self._admission)

    def step(self) -> bool:
        """Admit, compute one batch, deliver. False when there was nothing to compute."""
        for sequence in [s for s in self._by_id.values() if s.overdue(self._clock())]:
            self._finish(sequence, "error", "its deadline has passed", unavailable=True)
        for sequence in self._admission.yielding(self.running):
            self.running.preempt(sequence)
        self.running.join(self._admission.started(self.running, self.prefill_rate))
        work = self._plan()
        if work:
            self._run(work)
        self._measure()
        return bool(work)

    # what a step computes

    def _plan(self) -> list[Work]:
        """Decodes first, then chunks by turns, as far as budget and pages go."""
        budget, chunk = self.config.token_budget, self.config.chunk_size
        work: list[Work] = []
        for decoding in (True, False):
            found = [s for s in self.running if s.decoding is decoding]
            if work and found:
                chunk = min(chunk, self._mixed.tokens(len(work)))
                budget = min(budget, chunk)
            for sequence in found if decoding else self._admission.turns.sorted(found, ()):
                if not budget or sequence not in self.running:  # an older one took its pages
                    continue
                count = self._next_count(sequence, chunk)
                if count > budget:  # nobody overtakes it, so that it isn't starved
                    break
                if self.running.make_room(sequence, count):
                    work.append(Work(sequence, count))
                    budget -= count
                elif self.running.starved(sequence):
                    error = "no KV pages became free; the cache daemon is silent"
                    self._finish(sequence, "error", error, unavailable=True)
        return [w for w in work if w.sequence in self.running]

    def _next_count(self, sequence: Sequence, chunk: int) -> int:
        end = min(len(sequence.tokens), (sequence.computed // chunk + 1) * chunk)
        return end - sequence.computed

    # the step itself

    def _run(self, work: list[Work]) -> None:
        leases = [w.sequence.lease for w in work if w.sequence.lease]
        layer_ready = self.bridge.layer_ready(leases)
        started = self._clock()
        try:
            logits = self._compute.step(self._batch(work, leases), layer_ready)
        except PrefixLostError as lost:
            self._prefix_lost([w.sequence for w in work], lost)
            return
        except Exception:
            self._step_failed(work)
            return
        self.bridge.arrived(leases)
        self._metrics.steps.inc()
        chunks = [w.count for w in work if not w.sequence.decoding]
        self._metrics.prefilled_tokens.inc(sum(chunks))
        if layer_ready is None:  # a step that waited for its prefix would measure that
            self._mixed.measured(len(work) - len(chunks), sum(chunks), self._clock() - started)
        self._advance(work, logits)

    def _batch(self, work: list[Work], leases: list[Lease]) -> Batch:
        slices = [
            Slice(
                token_ids=w.sequence.tokens[w.sequence.computed : w.sequence.computed + w.count],
                context_len=w.sequence.computed + w.count,
                pages=lease.pages,
                num_logits=w.num_logits,
            )
            for w, lease in zip(work, leases, strict=True)
        ]
        return Batch.of(slices, self.bridge.config.page_size)

    def _step_failed(self, work: list[Work]) -> None:
        """Compute each request apart, so that only those end which fail alone. The step is merely
        repeated: computing KV again writes the same values. Called while the error is handled."""
        if len(work) == 1:
            sequence = work[0].sequence
            log.exception("a step of %s failed; it ends", sequence.request.request_id)
            self._finish(sequence, "error", "the step that computed this request failed")
            return
        log.exception("a step of %d requests failed; each is computed apart", len(work))
        for w in work:
            self._run([w])

    def _prefix_lost(self, sequences: list[Sequence], lost: PrefixLostError) -> None:
        """The rest of the batch just repeats the step: computing KV again writes the same
        values."""
        for sequence in sequences:
            if sequence.lease is not None and sequence.lease.transfer:
                log.warning("%s is computed anew: %s", sequence.request.request_id, lost)
                self._metrics.prefix_lost.inc()
                sequence.cached = False
                self.running.set_back(sequence)

    def _advance(self, work: list[Work], logits: Tensor) -> None:
        rows = apart(logits, [w.num_logits for w in work])
        for w in work:
            w.sequence.computed += w.count
            self._admission.turns.computed(w.sequence.tenant, w.count)
            if w.sequence.first_token_at is None:
                w.sequence.prefilled_tokens += w.count
        # before anything is released: a lease's last blocks are committed too
        computed = [(w.sequence, w.sequence.lease, w.sequence.computed) for w in work]
        self.bridge.commit(
            [
                (lease, sequence.array(end))
                for sequence, lease, end in computed
                if lease and self.bridge.due(lease, end)
            ],
            soon=self._pages_soon(),
        )
        sequences = [w.sequence for w in work]
        score_prompts(sequences, rows)
        ended = [
            (s, r) for s, r in zip(sequences, rows, strict=True) if s.computed == len(s.tokens)
        ]
        ends = last_rows(logits, [mine for _, mine in ended])
        chosen = self._sampler.sample(ends, [sequence.draw() for sequence, _ in ended])
        for (sequence, _), token, row in zip(ended, chosen, ends, strict=True):
            self._next_token(sequence, token, row)

    def _pages_soon(self) -> int:
        """Pages that the next step's chunks need, to be granted with this step's commits."""
        size, chunk = self.bridge.config.page_size, self.config.chunk_size
        return sum(-(-self._next_count(s, chunk) // size) for s in self.running if not s.decoding)

    def _next_token(self, sequence: Sequence, chosen: int | Exception, logits: Tensor) -> None:
        """What fails on one row ends this request and no other."""
        try:
            token = sequence.took(chosen)
            output = self._delivery.output(sequence, token, logits)
        except Exception:
            log.exception("no token of %s could be chosen; it ends", sequence.request.request_id)
            self._finish(sequence, "error", "no token of this request could be chosen")
            return
        self._delivery.count(sequence)
        if output.finish is None:
            sequence.request.deliver(output)
        else:
            last = self._delivery.whole(sequence, output)
            self._remove(sequence)
            self._delivery.end(sequence, last)

    # the end of a request

    def _finish(
        self, sequence: Sequence, reason: str, error: str, *, unavailable: bool = False
    ) -> None:
        self._remove(sequence)
        self._delivery.fail(sequence, reason, error, unavailable=unavailable)

    def _remove(self, sequence: Sequence) -> None:
        """Out of whatever state it is in; its pages go back."""
        del self._by_id[sequence.request.request_id]
        self._admission.remove(sequence)
        self.running.leave(sequence)

    # what is measured

    def _tell_rate(self, tokens_per_s: float) -> None:
        self.bridge.prefill_rate = tokens_per_s
        self._metrics.prefill_rate.set(tokens_per_s)

    def _measure(self) -> None:
        self._metrics.running.set(len(self.running))
        self._metrics.waiting.set(len(self._admission))
        counts = self.bridge.book.counts()
        for owner in ("free", "used", "daemon", "quarantined"):
            self._metrics.pages.labels(owner).set(getattr(counts, owner))


def check(scheduler: Scheduler) -> None:
    """Raises AssertionError when pages and sequences don't agree. For tests; between steps
    only."""
    orders = [sequence.order for sequence in scheduler.running]
    assert orders == sorted(orders), "running sequences are out of order"
    for sequence in scheduler.running:
        assert sequence.lease is not None, "a running sequence has no lease"
        room = len(sequence.lease.pages) * scheduler.bridge.config.page_size
        assert sequence.computed <= room, "KV was computed without a page"
    for sequence in (*scheduler._admission.waiting, *scheduler._admission.deferred):
        assert sequence.lease is None, "a waiting sequence holds a lease"
    scheduler.bridge.book.check()

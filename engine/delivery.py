"""What a request is told: each token with its text, why it ended, an error; and what that counts.

Not responsible for when a request ends otherwise (scheduler), nor for the words of HTTP (http).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from engine.metrics import EngineMetrics
from engine.prefix import Bridge
from engine.request import Output
from engine.scores import scores
from engine.sequence import Sequence


class Delivery:
    """The scheduler's thread calls all of it. `clock` is monotonic seconds."""

    def __init__(
        self, *, bridge: Bridge, metrics: EngineMetrics, clock: Callable[[], float]
    ) -> None:
        self._bridge = bridge
        self._metrics = metrics
        self._clock = clock

    def output(self, sequence: Sequence, token: int, logits: Tensor) -> Output:
        """The news that `token`, now its last one, makes; advances the request's text. logits: [V],
        those that it was chosen by."""
        request = sequence.request
        output = Output(token_id=token, prompt=sequence.take_prompt_scores())
        if request.top_scores is not None:
            ((chosen, top),) = scores(logits[None], [token], request.top_scores)
            output = replace(output, chosen=chosen, top=top)
        if token in request.end_token_ids:
            return replace(output, text=request.text.flush(), finish="stop")
        piece = request.text.push(token)
        if piece.stop is not None:
            return replace(output, text=piece.text, finish="stop", stop=piece.stop)
        if sequence.generated >= request.max_tokens:
            return replace(output, text=piece.text + request.text.flush(), finish="length")
        return replace(output, text=piece.text)

    def count(self, sequence: Sequence) -> None:
        """A token of it was made."""
        self._metrics.generated_tokens.inc()
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
            self._metrics.ttft.observe(sequence.first_token_at - sequence.arrived)
            self._metrics.prompt_tokens.inc(sequence.prompt_tokens)
            for tier in ("gpu", "cpu", "disk", "remote"):
                self._metrics.matched_tokens.labels(tier).inc(getattr(sequence.tiers, tier))

    def whole(self, sequence: Sequence, output: Output) -> Output:
        """The last output of a sequence that is answered whole, with what the request asks to be
        told. Its lease is not released yet, and is marked as ended."""
        held = None
        if sequence.lease is not None:
            sequence.lease.ended = True
            held = self._bridge.settled(sequence.lease) if sequence.request.tell_held else None
        explanation = sequence.explanation
        return replace(output, stats=sequence.stats(), explanation=explanation, held=held)

    def end(self, sequence: Sequence, output: Output) -> None:
        """It has ended, and holds nothing any more."""
        assert output.finish
        self._metrics.requests.labels(output.finish).inc()
        sequence.request.deliver(output)

    def fail(self, sequence: Sequence, reason: str, error: str, *, unavailable: bool) -> None:
        """The same, before it is answered whole."""
        stats = sequence.stats()
        self.end(sequence, Output(finish=reason, error=error, unavailable=unavailable, stats=stats))

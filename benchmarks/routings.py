"""Routings to try placements on: which experts a stream of tokens chooses, with skew and drift.

A documented generator, since the embedded model's routers are random. A router's logit of an expert
is the sum of what all text shares, of what its topic and its document add, and of a token's own
Gumbel noise; the k highest are chosen, which draws k experts without replacement by their softmax.
The spreads are fitted (on seeds under 100, which no benchmark reports) to what was measured of
OLMoE-1B-7B-0924, 64 experts, 8 chosen, 16 layers:
  github.com/JustVugg/colibri/issues/864: of all (layer, expert) pairs over five domains and
    Wikipedia the top 64, 128, 256 of 1,024 serve 21.4, 34.7, 51.9 % of the activations; the top 32
    of a layer 75.2 %, at least 68.1 %;
  github.com/MakazhanAlpamys/Soup/pull/992: on one corpus the busiest quarter of the experts serves
    41 to 67 %, the Gini coefficient is 0.27 to 0.56;
  doi.org/10.5281/zenodo.19457411: the most topical expert has 1.6 to 2.3 times its even share.
`python -m benchmarks.routings` prints the generator's figures beside these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]  # [layers, experts]
Counts = NDArray[np.float64]  # [layers, experts]

SHARED_SPREAD = (0.35, 1.25)  # standard deviations, from one layer to another
TOPIC_SPREAD, DOCUMENT_SPREAD = 0.7, 0.6
PROMPT_TOKENS, CHUNK_TOKENS, ANSWER_TOKENS = 768, 256, 256


@dataclass(frozen=True)
class Shape:
    """Of OLMoE."""

    layers: int = 16
    experts: int = 64
    chosen: int = 8
    topics: int = 6


@dataclass(frozen=True)
class Step:
    """What one step of an engine chose: `counts` of `tokens`; `prompt_tokens` of them are of
    prompts, and chose `prompt_counts`."""

    counts: Counts
    tokens: int
    prompt_counts: Counts
    prompt_tokens: int


class Text:
    """Topics of one model, and documents on them. Every document is new."""

    def __init__(self, seed: int, shape: Shape = Shape()) -> None:
        self.shape = shape
        self._random = np.random.default_rng(seed)
        size = (shape.layers, shape.experts)
        spreads = self._random.uniform(*SHARED_SPREAD, (shape.layers, 1))
        self._shared = self._random.normal(0, 1, size) * spreads
        self._topics = self._random.normal(0, TOPIC_SPREAD, (shape.topics, *size))

    def document(self, topic: int) -> Logits:
        size = (self.shape.layers, self.shape.experts)
        own = self._random.normal(0, DOCUMENT_SPREAD, size)
        return (self._shared + self._topics[topic] + own).astype(np.float32)

    def choose(self, document: Logits, tokens: int) -> Counts:
        """What so many tokens of a document choose."""
        layers, experts, k = self.shape.layers, self.shape.experts, self.shape.chosen
        noise = self._random.standard_exponential((tokens, layers, experts), np.float32)
        # the k lowest of exponentials over their rates: as of Gumbels, and without a logarithm
        scores = noise * np.exp(-document)
        ids = np.argpartition(scores, k - 1, axis=-1)[..., :k]
        flat = (ids + np.arange(layers)[:, None] * experts).reshape(-1)
        return np.bincount(flat, minlength=layers * experts).reshape(layers, experts).astype(float)

    def topic(self, topics: tuple[int, ...]) -> int:
        return int(self._random.choice(topics))

    def profile(self, topics: tuple[int, ...], documents: int = 60, tokens: int = 100) -> Counts:
        """What an operator records beforehand, on documents that nobody sees again."""
        drawn = [self.document(self.topic(topics)) for _ in range(documents)]
        return np.sum([self.choose(each, tokens) for each in drawn], axis=0)

    def steps(self, topics: tuple[int, ...], tokens: int, running: int) -> Iterator[Step]:
        """Steps of an engine with `running` requests, each of them a new document on one of these
        topics: its prompt in chunks, beside which the others decode, then its answer."""
        none = np.zeros((self.shape.layers, self.shape.experts))
        sequences: list[tuple[Logits, int, int]] = []  # document, prompt and answer tokens left
        done = 0
        while done < tokens:
            if len(sequences) < running:
                # the first ones don't begin together, so that they don't end together
                answer = ANSWER_TOKENS * (len(sequences) + 1) // running
                document = self.document(self.topic(topics))
                sequences.append((document, PROMPT_TOKENS, answer))
            counts, prompt_counts, prompt_tokens, count = none.copy(), none, 0, 0
            after = []
            for document, prompt, answer in sequences:
                took = int(not prompt)
                if prompt and not prompt_tokens:  # one prompt at a time
                    took = min(prompt, CHUNK_TOKENS)
                if took:
                    chosen = self.choose(document, took)
                    counts += chosen
                    count += took
                if prompt and took:
                    prompt_counts, prompt_tokens = chosen, took
                left = (document, prompt - took, answer) if prompt else (document, 0, answer - took)
                if left[2]:
                    after.append(left)
            sequences = after
            done += count
            yield Step(counts, count, prompt_counts, prompt_tokens)


def usage(text: Text) -> dict[str, float]:
    """The figures that were published, of this text."""
    experts, topics = text.shape.experts, text.shape.topics
    by_topic = np.array([text.profile((topic,), 6, 80) for topic in range(topics)])
    mixed = by_topic.sum(0)
    ranked = np.sort(mixed.reshape(-1))[::-1] / mixed.sum()
    half = np.sort(mixed, axis=1)[:, experts // 2 :].sum(1) / mixed.sum(1)
    ordered = np.sort(by_topic, axis=2)
    busiest = ordered[:, :, -experts // 4 :].sum(2) / ordered.sum(2)
    weights = 2 * np.arange(1, experts + 1) - experts - 1
    gini = (weights * ordered).sum(2) / (experts * ordered.sum(2))
    told = {f"top 1/{part} of all": ranked[: ranked.size // part].sum() for part in (16, 8, 4)}
    return told | {
        "top half of a layer": half.mean(),
        "the same, least": half.min(),
        "busiest quarter, one topic": busiest.mean(),
        "Gini, one topic": gini.mean(),
    }


PUBLISHED = ("0.214", "0.347", "0.519", "0.752", "0.681", "0.41 to 0.67", "0.27 to 0.56")


def main() -> None:
    for (name, ours), published in zip(usage(Text(seed=100)).items(), PUBLISHED, strict=True):
        print(f"{name:28} {ours:.3f}   published {published}")


if __name__ == "__main__":
    main()

"""The index's machine with leases that are no use of what they pin: nothing is learnt of them."""

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.oracles.blocks import Prompt
from tests.oracles.lives import IndexLives
from tests.oracles.machines import choice, namespaces, prompts, skips, some_hints
from tests.oracles.model_parts import Hints


class UntouchedLives(IndexLives):
    """Their pages are pinned and they take commits as others do."""

    @rule(namespace=namespaces, gpu=choice, prompt=prompts, limit=st.sampled_from([9, 9, 3, 0]),
          hints=some_hints, skip=skips)  # fmt: skip
    def acquire_untouched(
        self, namespace: int, gpu: int, prompt: Prompt, limit: int, hints: Hints, skip: int
    ) -> None:
        pool = self.a_head(gpu)
        if not self.model.pools[pool].closed:
            self.open(namespace, pool, prompt, limit, hints, skip=skip, touches=False)

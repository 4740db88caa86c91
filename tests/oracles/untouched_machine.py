"""The index's machine with leases that are no use of what they pin: nothing is learnt of them."""

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.oracles.blocks import Prompt
from tests.oracles.keys_machine import KEYS, KeysMachine, some_keys
from tests.oracles.lives import IndexLives
from tests.oracles.machines import choice, namespaces, prompts, skips, some_hints
from tests.oracles.model_parts import PRIVATE, Hints


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


class UntouchedKeys(KeysMachine):
    """The same of opaque keys. One may be of no key, and keeps what is committed in it."""

    @rule(pool=choice, keys=some_keys, deep=st.booleans())
    def keys_are_pinned(self, pool: int, keys: list[bytes], deep: bool) -> None:
        at = self.living(pool)
        self.calm()
        self.grant(at, len(keys) + 1)
        *pages, last = self.some(at, PRIVATE, len(keys) + 1, 0) or [0]
        self.put(at, keys[: len(pages)], pages)
        if deep:
            self.demote_all(9, to_disk=True)
        self.open_lease(at, [*keys, KEYS[-1]], touches=False)
        of_none = self.open_lease(at, [], touches=False)
        self.put(at, [KEYS[-1]], [last], of_none)
        self.evict(at, 9)

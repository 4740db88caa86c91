"""Random walks of the index with a router that listens: what it was told is what is there."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from kvc2 import _core
from tests.oracles.blocks import PAGE_SIZE, extras_digest, extras_of, tokens_of
from tests.oracles.keys_machine import KeysMachine
from tests.oracles.machines import DEAD_BLOCKS, SEEN
from tests.oracles.model_parts import Path

ALL_FITS, LITTLE, LESS = 1 << 20, 3000, 1000  # bytes that wait at most
KINDS = {getattr(_core, f"KV_{kind}"): kind for kind in ("CLEARED", "STORED", "REMOVED")}
NO_KEY = bytes(16)
Named = tuple[bytes, bytes, bytes, tuple[int, ...]]  # namespace, parent, extras, words


@dataclass(frozen=True)
class Event:
    kind: str
    tier: int
    key: bytes
    named: Named


def events_of(taken: _core.KvEvents) -> list[Event]:
    ends = np.cumsum(taken.words_of, dtype=np.int64)
    return [
        Event(
            KINDS[int(taken.kinds[i])],
            int(taken.tiers[i]),
            taken.keys[i].tobytes(),
            (
                taken.namespaces[i].tobytes(),
                taken.parents[i].tobytes(),
                taken.extras[i].tobytes(),
                tuple(taken.words[ends[i] - taken.words_of[i] : ends[i]].tolist()),
            ),
        )
        for i in range(len(taken.kinds))
    ]


@dataclass
class Router:
    """The naive consumer: by tier and key, what names the block."""

    there: dict[tuple[int, bytes], Named] = field(default_factory=dict)
    heard: set[bytes] = field(default_factory=lambda: {NO_KEY})  # keys, since all was cleared

    def apply(self, event: Event) -> None:
        SEEN[f"event: {event.kind}"] += 1
        match event.kind:
            case "CLEARED":
                self.there.clear()
                self.heard = {NO_KEY}
            case "REMOVED":
                self.there.pop((event.tier, event.key), None)
            case "STORED":
                SEEN["event: before its parent"] += event.named[1] not in self.heard
                self.heard.add(event.key)
                SEEN["event: told again"] += (event.tier, event.key) in self.there
                self.there[event.tier, event.key] = event.named


class EventsMachine(KeysMachine):
    """Takes what is told at any time, and compares where it has taken all."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()

    @initialize(
        limited=st.booleans(),
        picky=st.sampled_from([False, True]),
        waiting=st.sampled_from([ALL_FITS, ALL_FITS, LITTLE, LESS]),
        pages=st.sampled_from([1, 2, 3, 100]),
        patience=st.sampled_from([1, 1, 3, 7]),
    )
    def build(
        self,
        limited: bool,
        picky: bool,
        waiting: int = ALL_FITS,
        pages: int = 1,
        patience: int = 1,
    ) -> None:
        self.pages, self.patience, self.turn = pages, patience, 0
        self.index = _core.Index(
            first_generation=10,
            policy=self.policy,
            dead_blocks=DEAD_BLOCKS,
            kv_event_bytes=waiting,
        )
        super().build(limited, picky)

    @invariant()
    def listens(self) -> None:
        """One chunk every few steps, so that a scan goes on between changes."""
        self.turn += 1
        if self.turn % self.patience == 0:
            self.take_one()

    def take_one(self) -> bool:
        """Whether there is more."""
        taken, more = self.index.take_kv_events(self.pages)
        for event in events_of(taken):
            self.router.apply(event)
        SEEN["events: some are left"] += more
        if not more:
            self.agrees()
        return more

    @rule()
    def take_all(self) -> None:
        while self.take_one():
            pass

    @rule()
    def begin_anew(self) -> None:
        self.index.tell_kv_events_anew()

    def agrees(self) -> None:
        there: dict[tuple[int, bytes], Named] = {}
        for pool in self.model.pools.values():
            for path in filter(pool.resident, pool.blocks):
                key, named = self.name(path)
                there[pool.tier, key] = named
        assert self.router.there == there
        SEEN["events: all taken"] += 1
        SEEN["events: all taken, after an overflow"] += self.index.kv_event_overflows() > 0

    def name(self, path: Path) -> tuple[bytes, Named]:
        space, *blocks = path
        if space in self.key_spaces:
            words = np.array(blocks[0], np.uint32)
            keys = _core.chain_keys(self.names[space], words, len(words))  # type: ignore[call-overload]
            extras = b""
        else:
            words = tokens_of(blocks[-1:])  # type: ignore[arg-type]
            tokens = tokens_of(blocks)  # type: ignore[arg-type]
            name = self.names[space]  # type: ignore[call-overload]
            keys = _core.chain_keys(name, tokens, PAGE_SIZE, extras_of(blocks))  # type: ignore[arg-type]
            extras = extras_digest(blocks[-1])  # type: ignore[arg-type]
        parent = keys[-2].tobytes() if len(keys) > 1 else NO_KEY
        named = (
            self.names[space],  # type: ignore[call-overload]
            parent,
            extras or bytes(32),
            tuple(words.tolist()),
        )
        return keys[-1].tobytes(), named

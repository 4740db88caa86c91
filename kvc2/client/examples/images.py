"""Prompts with images: their placeholder tokens are alike, their digests tell them apart. Run it
beside `kvc2 serve`: python -m kvc2.client.examples.images unix:/run/user/1000/kvc2/kvc2.sock"""

import hashlib
import sys

import numpy as np

from kvc2.client import Asked, BridgeConfig, Daemon, Media, PoolMemory, open_bridge
from kvc2.foreign_identity import Foreign
from kvc2.layout import layer_major

SIZE, PAGES, PLACEHOLDER = 16, 64, 151655  # tokens of a page; pages of the pool
layout = layer_major(1, PAGES, segment_bytes=4 * SIZE, page_size=SIZE)
identity = Foreign("image example", "no weights", {"page_size": SIZE})
pool = PoolMemory(layout.payload_bytes * PAGES)
config = BridgeConfig(SIZE, identity.encode(), low_water=16)
bridge = open_bridge(PAGES, config, Daemon(sys.argv[1], pool, layout, "images"))
bridge.wait_attached(10)  # only so that the example has hits: an engine needs no daemon

text, image, question = np.arange(40), np.full(50, PLACEHOLDER), np.arange(10)
prompt = np.concatenate([text, image, question]).astype(np.uint32)
for name in ("cat", "cat", "dog"):
    # of the pixels and of how they are prepared; where the image is, and in how many tokens
    extra = Media(len(text), len(image), hashlib.sha256(name.encode()).digest())
    lease = bridge.acquire(name.encode(), Asked(prompt, extras=[extra])).result()
    bridge.grow(lease, len(prompt))  # and compute what is not cached, as engine.py does
    bridge.commit([(lease, prompt)])  # the lease knows its extras
    print(f"{name}: {lease.matched_tokens} tokens cached")
    bridge.release([lease])
    bridge.settle(10)
bridge.close()

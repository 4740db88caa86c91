"""A whole engine without a model: the KV of a token is the token. Run it beside `kvc2 serve`:
python -m kvc2.client.examples.engine unix:/run/user/1000/kvc2/kvc2.sock"""

import sys

import numpy as np

from kvc2.client import BridgeConfig, Daemon, PoolMemory, open_bridge
from kvc2.foreign_identity import Foreign
from kvc2.layout import layer_major

SIZE, PAGES = 16, 64  # tokens of a page; pages of the pool
layout = layer_major(1, PAGES, segment_bytes=4 * SIZE, page_size=SIZE)
identity = Foreign("example", "no weights", {"page_size": SIZE})
pool = PoolMemory(layout.payload_bytes * PAGES)
kv = np.frombuffer(pool.map, np.uint32).reshape(2, PAGES, SIZE)  # keys, values
config = BridgeConfig(SIZE, identity.encode(), low_water=16)
bridge = open_bridge(PAGES, config, Daemon(sys.argv[1], pool, layout, "example"))
bridge.wait_attached(10)  # only so that the example has hits: an engine needs no daemon

for name in (b"first", b"again"):
    prompt = np.arange(100, dtype=np.uint32)
    lease = bridge.acquire(name, prompt).result()
    if not bridge.grow(lease, len(prompt)):
        raise MemoryError("out of pages: an engine would set a request back, or `reclaim`")
    if (ready := bridge.layer_ready([lease])) is not None:
        ready(0)  # waits until the prefix has come, here from the cpu tier or the disk
        bridge.arrived([lease])
    at = np.arange(lease.matched_tokens, len(prompt))  # what is not cached is computed
    kv[:, np.array(lease.pages)[at // SIZE], at % SIZE] = prompt[at]
    bridge.commit([(lease, prompt)])  # its full blocks
    told = "equal" if (kv[0, lease.pages].ravel()[: len(prompt)] == prompt).all() else "wrong"
    print(f"{name.decode()}: {lease.matched_tokens} tokens cached, KV {told}")
    bridge.release([lease])
    bridge.settle(10)
bridge.close()

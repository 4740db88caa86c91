"""An engine whose KV lies in private memory: it reads the daemon's arena in place, and what it
stores is copied. Run it twice beside `kvc2 serve`:
python -m kvc2.client.examples.private_memory unix:/run/user/1000/kvc2/kvc2.sock"""

import sys

import numpy as np

from kvc2.client import ArenaTerms, Client, LeaseCommit, NamespaceHandle, PoolMemory, SessionOptions
from kvc2.client.staging import Staging
from kvc2.foreign_identity import Foreign
from kvc2.layout import Layout, Segment

SIZE, BLOCKS, PROMPT = 16, 8, np.arange(129, dtype=np.uint32)  # the last token is always computed
layout = Layout((Segment(0, 0, 4 * SIZE, 0, 4 * SIZE),), SIZE)  # a page: one record
identity = Foreign("example", "no weights", {"page_size": SIZE, "lies": "a token is its KV"})
pool, staging = PoolMemory(layout.payload_bytes * BLOCKS), Staging(BLOCKS)
options = SessionOptions("example", arena=True)
client = Client(sys.argv[1], pool=pool, layout=layout, engine=staging, options=options)
if not client.wait_attached(10):
    raise SystemExit(f"no daemon: {client.last_refusal}")
handle = client.open_handle(NamespaceHandle(identity.encode()))
kv = np.zeros((BLOCKS, SIZE), np.uint32)  # the engine's own

arena, poll = client.arena, 0
while (lease := client.acquire_in_arena(handle, b"r", PROMPT, ArenaTerms(poll=poll))).coming_blocks:
    poll += 1  # an engine schedules other requests meanwhile
there = lease.offsets.size if arena.read(lease.offsets, layout.payload_bytes, kv.data) else 0
client.release([b"r"])
kv[there:] = PROMPT[there * SIZE : -1].reshape(-1, SIZE)  # what is not cached is computed

pages = staging.take(BLOCKS)  # as many as there are: nobody else has any
np.frombuffer(pool.map, np.uint32).reshape(BLOCKS, SIZE)[pages] = kv
stored = client.commit_copies(handle, [LeaseCommit(b"", 0, PROMPT[:-1], pages)]).results[0]
staging.give_back(pages)  # the bytes are in the arena
told = "equal" if (kv.ravel() == PROMPT[:-1]).all() else "wrong"
print(f"{there} of {BLOCKS} blocks cached, {int((stored == 0).sum())} stored, KV {told}")
client.close()

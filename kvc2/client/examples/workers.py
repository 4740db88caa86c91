"""An engine of two processes: one schedules, its worker computes. Run it twice beside `kvc2 serve`:
python -m kvc2.client.examples.workers unix:/run/user/1000/kvc2/kvc2.sock"""

import multiprocessing
import sys
from multiprocessing.connection import Connection

import numpy as np

from kvc2.client import BridgeConfig, Daemon, PoolMemory, Share, open_bridge
from kvc2.foreign_identity import Foreign
from kvc2.layout import layer_major

SIZE, PAGES, PROMPT = 16, 64, np.arange(100, dtype=np.uint32)


def work(share: Share, pipe: Connection) -> None:
    session, transfer, pages, cached = pipe.recv()
    with share.open() as shared:
        if transfer and not shared.wait_layer(session, transfer, 0, 10):
            raise TimeoutError("the prefix did not come: compute it")
        kv = np.frombuffer(shared.map, np.uint32).reshape(2, PAGES, SIZE)
        at = np.arange(cached, len(PROMPT))
        kv[:, np.array(pages)[at // SIZE], at % SIZE] = PROMPT[at]
        pipe.send((kv[0, pages].ravel()[: len(PROMPT)] == PROMPT).all())
        del kv  # before the pool is closed


if __name__ == "__main__":
    layout = layer_major(1, PAGES, segment_bytes=4 * SIZE, page_size=SIZE)
    identity = Foreign("example", "no weights", {"page_size": SIZE})
    daemon = Daemon(sys.argv[1], PoolMemory(layout.payload_bytes * PAGES), layout, "example")
    bridge = open_bridge(PAGES, BridgeConfig(SIZE, identity.encode(), low_water=16), daemon)
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.Process(target=work, args=(bridge.share(), theirs))
    worker.start()
    bridge.wait_attached(10)
    lease = bridge.acquire(b"request", PROMPT).result()
    if bridge.grow(lease, len(PROMPT)):
        ours.send((lease.session, lease.transfer, lease.pages, lease.matched_tokens))
        print(f"{lease.matched_tokens} tokens cached, KV {'equal' if ours.recv() else 'wrong'}")
        bridge.commit([(lease, PROMPT)])
    worker.join()
    bridge.release([lease])
    bridge.close()

"""Run by a python that has vLLM: asks a daemon for all its KV events, and prints as JSON what
vLLM's own types make of them, and whether vLLM would have written the same bytes.

    python kv_events.py PATH
"""

from __future__ import annotations

import json
import sys

import msgspec
import zmq
from vllm.distributed.kv_events import KVEventBatch, ZmqEventPublisher

decoder, encoder = msgspec.msgpack.Decoder(KVEventBatch), msgspec.msgpack.Encoder()
context = zmq.Context()
asking = context.socket(zmq.DEALER)
asking.connect(f"ipc://{sys.argv[1]}.replay")
asking.send_multipart([b"", (0).to_bytes(8, "big")])
while True:
    assert asking.poll(10_000)
    _, _, number, payload = asking.recv_multipart()
    if number == ZmqEventPublisher.END_SEQ:
        break
    batch = decoder.decode(payload)
    told = {
        "number": int.from_bytes(number, "big"),
        "rank": batch.data_parallel_rank,
        "same": encoder.encode(batch) == payload,
        "events": [
            {"kind": type(event).__name__, **msgspec.structs.asdict(event)}
            for event in batch.events
        ],
    }
    print(json.dumps(told))
context.destroy(linger=0)

"""An engine that names blocks by hashes of its own and has its own memory. Run it beside `kvc2
serve`: python -m kvc2.client.examples.flat_keys unix:/run/user/1000/kvc2/kvc2.sock"""

import hashlib
import select
import sys

import numpy as np

from kvc2.client import Completions, open_objects
from kvc2.foreign_identity import Foreign

SIZE, COUNT = 1 << 16, 8  # bytes of a block; blocks
identity = Foreign("example", "no weights", {"page_size": 1, "keys": "sha256"})
objects = open_objects(sys.argv[1], identity.encode(), SIZE)
objects.client.wait_attached(10)  # only so that the example has hits: an engine needs no daemon

kv = np.arange(COUNT * SIZE // 4, dtype=np.uint32).reshape(COUNT, -1)
keys = [hashlib.sha256(row.tobytes()).digest() for row in kv]
print(f"{objects.exists(keys).sum()} of {COUNT} were there")
print(f"{objects.put_from(keys, kv.data).sum()} stored")

token, found = objects.lock(keys)  # they stay in memory until they are loaded
calls, mine = Completions(), np.zeros_like(kv)
loading = calls.submit(objects.get_into, keys, list(mine))  # each into a buffer of its own
select.select([calls.fd], [], [])  # an engine has this descriptor in its own loop
for done in calls.completed():
    print(f"{done.result().sum()} loaded, {'equal' if (mine == kv).all() else 'wrong'}")
objects.unlock(token)
calls.close()
objects.close()

"""Bugs of the remote tier, each as an edit of one file. planted.py plants them one by one."""

from __future__ import annotations

from dataclasses import replace

from tests.crash.bugs import Bug, bug

CODEC, LINK, BREAKER = (
    "kvc2/tiers/remote/codec.py",
    "kvc2/tiers/remote/link.py",
    "kvc2/tiers/remote/breaker.py",
)
QUEUE = "kvc2/tiers/remote/queue.py"
CHAINS, ARRIVALS = "kvc2/cache/chains.py", "kvc2/cache/arrivals.py"
FETCHES, PUTS, LEASES = "kvc2/cache/fetches.py", "kvc2/cache/puts.py", "kvc2/cache/leases.py"
TESTS = (
    (
        "tests/kvc2/tiers/test_remote_codec.py",
        "tests/kvc2/tiers/test_remote_link.py",
        "tests/kvc2/tiers/test_stores.py",
    ),
    ("tests/kvc2/cache/test_remote.py",),
)

BUGS = (
    bug("a value's digest is not checked", CODEC,
        "        return Verdict.PAYLOAD if state == _core.BLOCK_BAD_PAYLOAD else Verdict.OTHER\n",
        "        return Verdict.PAYLOAD if state == _core.BLOCK_BAD_PAYLOAD else Verdict.GOOD\n"),
    bug("a value's payload is not checked", CODEC,
        "        return Verdict.PAYLOAD if state == _core.BLOCK_BAD_PAYLOAD else Verdict.OTHER\n",
        "        return Verdict.GOOD if state == _core.BLOCK_BAD_PAYLOAD else Verdict.OTHER\n"),
    bug("a value's MAC is not checked", CODEC,
        "        if not hmac.compare_digest(", "        if False and not hmac.compare_digest("),
    bug("a MAC covers the header alone", CODEC,
        "        made.update(covered)", "        made.update(covered[:HEADER_BYTES])"),
    bug("a value may have any length", CODEC,
        "        if len(value) != value_bytes(self._shape):\n",
        "        if len(value) < value_bytes(self._shape):\n"),
    bug("a tenant's secret doesn't count", CODEC,
        '\\0" + tenant_secret, "sha256")', '\\0", "sha256")'),
    bug("the layout is no part of a name", CODEC,
        'shape.layout_digest[:8].hex().encode() + b":"', 'b":"'),
    bug("an invalidated era's values are found", CHAINS,
        "of_era(shared.name, namespace.era)", "of_era(shared.name, 0)"),
    bug("an image's extras are not in the header", CHAINS,
        "        rows[at[at < blocks]] = digests[at < blocks]\n", ""),
    bug("the breaker never opens", BREAKER,
        "        self.closed = False\n        self.rest_s = min(",
        "        self.rest_s = min("),
    bug("a ping makes the rest short again", BREAKER,
        "    def mended(self) -> None:\n        self.closed = True\n",
        "    def mended(self) -> None:\n        self.closed, self.rest_s = True, 0.0\n"),
    bug("nobody waits for less than the deadline", FETCHES,
        "            self._link.late()\n        return 0\n",
        "            pass\n        await asyncio.wait([asking])\n        return 0\n"),
    bug("a short deadline makes a store silent", FETCHES,
        "self._link.heard_at < begun and wait_s >= self._link.patience_s",
        "self._link.heard_at < begun"),
    bug("who goes away leaves pages pinned", FETCHES,
        "            self._arrivals.let_go(fetch)\n            raise\n", "            raise\n"),
    bug("what fails together rests ever longer", LINK,
        "        if self._breaker.closed:\n            self._breaker.failed()\n",
        "        self._breaker.failed()\n"),
    bug("a busy store is silent", FETCHES,
        "            silent = self._link.heard_at < before\n", "            silent = True\n"),
    bug("a silent store stays in use", FETCHES,
        "        if silent:\n            self._link.late()\n", ""),
    bug("a call has no deadline", LINK,
        "            async with asyncio.timeout(self._deadline_s):\n                return",
        "            async with asyncio.timeout(None):\n                return"),
    bug("a call that was late and is answered doesn't count", LINK,
        "        self._close_breaker(self._breaker.worked)\n        return found\n",
        "        return found\n"),
    bug("a bad value stays in the store", ARRIVALS,
        "                await self._means.link.delete(names)\n", "                pass\n"),
    bug("what comes for an ended namespace is committed", ARRIVALS,
        "        return not namespace.gone and namespace.number == self.number\n",
        "        return True\n"),
    bug("pages of bad values are lost", ARRIVALS,
        "        self._give_back(fetch, pages[good:])\n", ""),
    bug("leases of a fetch stay open", ARRIVALS,
        "            self._means.index.release_all(np.array(fetch.leases, np.uint64))\n", ""),
    bug("the queue has no bound", QUEUE,
        "        if self._bytes + num_bytes > self._bytes_max:\n", "        if False:\n"),
    bug("what is put lives for ever", PUTS, "values, strict=True)), item.ttl_s)",
        "values, strict=True)), 0)"),
    bug("every block is put each time", PUTS,
        "                self._known.add(key.tobytes())\n", "                pass\n"),
    bug("a lease that was released meanwhile is opened again", LEASES,
        "            if not lease.is_open:\n                return ended_meanwhile(",
        "            if False:\n                return ended_meanwhile("),
    bug("what only pinned is never released", LEASES,
        "        if pinned:\n            self._index.release_all(",
        "        if False:\n            self._index.release_all("),
)  # fmt: skip
REMOTE_BUGS: tuple[Bug, ...] = tuple(replace(each, tests=TESTS) for each in BUGS)

"""Bugs of leases in the arena, polls, copied commits and opaque keys in the cache and the server,
each as an edit of one file. planted.py plants them one by one; those of the index are in
tests/csrc/mutant_patches.py."""

from __future__ import annotations

from dataclasses import replace

from tests.crash.bugs import Bug, bug

LEASES, COPIED = "kvc2/cache/leases.py", "kvc2/cache/copied.py"
VIEWS = "kvc2/cache/lease_views.py"
CACHE, SESSIONS = "kvc2/cache/cache.py", "kvc2/cache/sessions.py"
WHOLE = "kvc2/cache/whole.py"
ATTACH, CHECKS = "kvc2/server/attach.py", "kvc2/server/checks.py"
HELLO, CALLS = "kvc2/server/hello.py", "kvc2/server/session_calls.py"
MEMORY = "kvc2/client/memory.py"
TESTS = (
    (
        "tests/kvc2/cache/test_polls.py",
        "tests/kvc2/cache/test_copied.py",
        "tests/kvc2/cache/test_arena_leases.py",
        "tests/kvc2/cache/test_keys.py",
        "tests/kvc2/cache/test_sessions.py",
        "tests/kvc2/server/test_arena_handover.py",
    ),
    ("tests/kvc2/cache/test_cache_machine.py", "tests/kvc2/server/test_server.py"),
    ("tests/system/test_arena_reader.py",),
)

WHAT_IS_TOLD = (
    bug(
        "what is on its way is told",
        VIEWS,
        "        pages = view.pages[: view.arrived] if to.in_arena else view.pages\n",
        "        pages = view.pages\n",
    ),
    bug(
        "a key that is on its way is told",
        VIEWS,
        "        there = view.arrived.astype(bool)\n",
        "        there = view.pages != _core.NO_PAGE\n",
    ),
    bug(
        "a poll that comes again answers anew",
        LEASES,
        "    if terms.poll > lease.poll or lease.polled is None:\n",
        "    if True:\n",
    ),
    bug(
        "the next poll answers as the last one",
        LEASES,
        "    if terms.poll > lease.poll or lease.polled is None:\n",
        "    if lease.polled is None:\n",
    ),
    bug(
        "any poll number is taken",
        LEASES,
        "    if not terms.at_once or terms.poll not in (lease.poll, lease.poll + 1):\n",
        "    if False:\n",
    ),
    bug(
        "a poll brings nothing",
        LEASES,
        "                    lease.bringing = asyncio.create_task(_suppressed(bringing))\n",
        "                    bringing.close()\n",
    ),
    bug(
        "skipped blocks count as held",
        VIEWS,
        "            first_block=view.first_block,\n",
        "            first_block=0,\n",
    ),
    bug(
        "a pool has pages of another layout",
        LEASES,
        "    if not terms.in_arena and pools is not gpu.pools:\n",
        "    if False:\n",
    ),
)
ENDS = (
    bug(
        "leases in the arena outlive their session",
        CACHE,
        "        self.index.release_all(session.end_leases())\n",
        "        session.end_leases()\n",
    ),
    bug(
        "no fence",
        ATTACH,
        "            handover.fence()  # before its leases end\n",
        "            pass\n",
    ),
    bug(
        "the fence comes after the leases' end",
        ATTACH,
        "            handover.fence()  # before its leases end\n",
        "            asyncio.get_running_loop().call_later(0.2, handover.fence)\n",
    ),
    bug(
        "a reader doesn't look at the fence",
        MEMORY,
        "        return bool(self._fence[0])\n",
        "        return False\n",
    ),
    bug(
        "every session expires alike",
        SESSIONS,
        "                else now - each.last_heartbeat >= each.expiry_s\n",
        "                else now - each.last_heartbeat >= EXPIRY_S\n",
    ),
    bug(
        "layouts of namespaces that were let go of stay",
        SESSIONS,
        "        self.layouts.pop(namespace_id, None)\n",
        "",
    ),
)
COPIES = (
    bug(
        "pages of refused copies are lost",
        COPIED,
        "        if unused.size:\n            self._index.give_back(cpu, unused)\n",
        "",
    ),
    bug(
        "pages of duplicate keys are lost",
        COPIED,
        "(_core.ADOPTED,) if self.keys else (_core.ADOPTED, _core.DUPLICATE)\n",
        "(_core.ADOPTED, _core.DUPLICATE)\n",
    ),
    bug(
        "pages of a copy that failed are lost",
        COPIED,
        "            self._index.give_back(cpu, granted)\n            raise errors.SessionOver(",
        "            raise errors.SessionOver(",
    ),
    bug(
        "what an ended session may have written to is adopted",
        COPIED,
        "            return came.whole and await gpu.holds()\n",
        "            return came.whole\n",
    ),
    bug(
        "copies live for ever",
        COPIED,
        "        number, hints = blocks.namespace.number, blocks.namespace.hints(NO_HINTS)\n",
        "        number, hints = blocks.namespace.number, _core.Hints()\n",
    ),
    bug(
        "a lease from before an invalidation takes copies of keys",
        COPIED,
        "            return lease.id, lease.number, results\n",
        "            return lease.id, blocks.namespace.number, results\n",
    ),
    bug(
        "a copied commit that comes again is refused",
        COPIED,
        "                self._commit_again(lease.id, blocks, results)\n",
        "                pass\n",
    ),
    bug(
        "nobody waits for copies, which are committed",
        COPIED,
        "            if opened:\n"
        "                self._index.release_all(np.array([lease], np.uint64))\n"
        "            raise\n",
        "            raise\n",
    ),
    bug(
        "a namespace that was let go of takes copies",
        COPIED,
        "            pools = session.layouts.get(blocks.namespace.id)\n",
        "            pools = gpu.pools\n",
    ),
    bug(
        "an answer comes before the copy",
        COPIED,
        "await asyncio.shield(asyncio.ensure_future(self._carry_out(gpu, copy, results)))\n",
        "self._task = asyncio.ensure_future(self._carry_out(gpu, copy, results))\n"
        "            results[:] = 0\n",
    ),
    bug(
        "durable copies of keys in a lease are not waited for",
        WHOLE,
        "            return self._index.held_in(lease, pools.cpu.id)\n",
        "            return 0\n",
    ),
)
LIMITS = (
    bug(
        "the arena is handed to any user",
        ATTACH,
        "        if uid != os.geteuid():\n",
        "        if False:\n",
    ),
    bug(
        "an expiry without a limit",
        HELLO,
        "    if hello.expiry_ms > EXPIRY_MS_MAX:\n",
        "    if False:\n",
    ),
    bug(
        "a key may be longer",
        CHECKS,
        "KEY_BYTES_MAX = 64\n",
        "KEY_BYTES_MAX = 65\n",
    ),
    bug(
        "keys and tokens name one namespace",
        CALLS,
        "session.uid, request.identity, request.salt, opaque=of.opaque\n",
        "session.uid, request.identity, request.salt\n",
    ),
    bug(
        "any number of keys",
        CHECKS,
        "    if not 1 <= len(request.keys) <= limits.max_keys:\n",
        "    if not request.keys:\n",
    ),
)
LEASE_BUGS: tuple[Bug, ...] = tuple(
    replace(each, tests=TESTS) for each in (*WHAT_IS_TOLD, *ENDS, *COPIES, *LIMITS)
)

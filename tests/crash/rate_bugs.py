"""Bugs of tenants' limits of rate, each as an edit of one file. planted.py plants them."""

from __future__ import annotations

from dataclasses import replace

from tests.crash.bugs import Bug, bug

RATES, CALLERS = "kvc2/server/rates.py", "kvc2/server/callers.py"
SESSION, SHARED = "kvc2/server/session_calls.py", "kvc2/server/shared_calls.py"
COMMITS, STREAMS = "kvc2/server/commits.py", "kvc2/server/streams.py"
WIRING, CHANNEL = "kvc2/server/wiring.py", "kvc2/client/channel.py"
TESTS = (("tests/kvc2/server/test_rates.py",),)

BUGS = (
    bug("a second's worth is not the most that is saved up", RATES,
        "        self._left = min(self._most, self._left + (now - self._at) * self._per_s)\n",
        "        self._left += (now - self._at) * self._per_s\n"),
    bug("the time since the last call counts again", RATES,
        "        self._at = now\n        lacking", "        lacking"),
    bug("more bytes than there are cost no more than these", RATES,
        "self._left -= count\n", "self._left = max(0.0, self._left - count)\n"),
    bug("what is refused takes of the calls", RATES,
        '        limit = max(waits, key=lambda each: waits[each])\n        if waits[limit]:\n',
        '        limit = max(waits, key=lambda each: waits[each])\n'
        '        self.calls.take(1)\n        if waits[limit]:\n'),
    bug("calls without payloads wait for bytes", RATES,
        "        if num_bytes:\n            waits", "        if True:\n            waits"),
    bug("bytes have no limit", RATES, "        self.bytes.take(num_bytes)\n", ""),
    bug("megabytes are bytes", RATES, "MB = 1_000_000\n", "MB = 1\n"),
    bug("all tenants share one bucket", RATES,
        "name: Buckets(config.limits, tenant, now) for name, tenant in tenants.items()",
        "name: one for one in [Buckets(config.limits, tenants['a'], now)] for name in tenants"),
    bug("a tenant's own limit doesn't count", RATES,
        "        found: float = getattr(self._limits, limit) if own is None else own\n",
        "        found: float = getattr(self._limits, limit)\n"),
    bug("a tenant's limit of 0 is that of all", RATES,
        "        found: float = getattr(self._limits, limit) if own is None else own\n",
        "        found: float = own or getattr(self._limits, limit)\n"),
    bug("a refusal is not counted", RATES,
        "            self._metrics.refused(tenant, error.limit)\n", ""),
    bug("when to come back is not told", WIRING,
        "    if isinstance(error, errors.RateLimited):\n", "    if False:\n"),
    bug("a client doesn't hear when to come back", CHANNEL,
        "    if isinstance(answered, errors.RateLimited):\n", "    if False:\n"),
    bug("a session's calls have no limit", CALLERS,
        "            self.rates.take(namespace.owner.tenant)\n", "            pass\n"),
    bug("calls in no namespace have no limit", CALLERS,
        "            self.rates.take(tenant)\n", "            pass\n"),
    bug("a credential's calls have no limit without a namespace", CALLERS,
        "            self.rates.take(next(iter(caller.tenants)))\n", "            pass\n"),
    bug("an operator has a tenant's limit", CALLERS,
        "        if session is None and (caller is None or caller.is_administrator):\n",
        "        if session is None and caller is None:\n"),
    bug("a call that opens a namespace has no limit", SESSION,
        "        self._callers.rates.take(tenant or DEFAULT_TENANT)\n", ""),
    bug("a release is refused", SESSION,
        "        if not len(returned) and session.leases.keys().isdisjoint(ids):\n",
        "        if True:\n"),
    bug("a release of nothing has no limit", SESSION,
        "        if not len(returned) and session.leases.keys().isdisjoint(ids):\n",
        "        if False:\n"),
    bug("a commit of nothing has no limit", SESSION,
        "        if not commits:\n", "        if False:\n"),
    bug("an invalidate has no limit", SHARED,
        "            self._callers.take(session, namespace)\n", ""),
    bug("a call that explains a request has no limit", SHARED,
        "            self._callers.take(session)\n", ""),
    bug("one tenant's refusal is that of a whole commit", COMMITS,
        "        if late and len(late) == len(num_bytes):\n", "        if late:\n"),
    bug("a commit of several tenants keeps all", COMMITS,
        "        return [each.namespace.owner.tenant not in late for each in commits]\n",
        "        return [True for each in commits]\n"),
    bug("refused blocks are answered last", COMMITS,
        "                results.insert(index, ", "                results.append("),
    bug("a read brings no bytes", STREAMS, "owner.tenant, blocks.size * size)", "owner.tenant)"),
    bug("a write brings no bytes", STREAMS,
        "        self._callers.rates.take(*paid(session, blocks))\n",
        "        self._callers.rates.take(paid(session, blocks)[0])\n"),
)  # fmt: skip
RATE_BUGS: tuple[Bug, ...] = tuple(replace(each, tests=TESTS) for each in BUGS)

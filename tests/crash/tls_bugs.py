"""Bugs of TLS and of who may call over it, each as an edit of one file. planted.py plants them."""

from __future__ import annotations

from dataclasses import replace

from tests.crash.bugs import Bug, bug

TLS, FILES = "kvc2/server/tls.py", "kvc2/host/tls.py"
CALLERS, CREDENTIALS = "kvc2/server/callers.py", "kvc2/server/credentials.py"
SHARED, SESSION = "kvc2/server/shared_calls.py", "kvc2/server/session_calls.py"
NAMESPACES, EXPLAIN = "kvc2/cache/namespaces.py", "kvc2/cache/explain.py"
TESTS = (("tests/kvc2/server/test_credentials.py",), ("tests/system/test_tls.py",))

BUGS = (
    bug("a client needs no certificate", TLS,
        "require_client_authentication=True", "require_client_authentication=False"),
    bug("changed files of TLS don't count", TLS,
        "                if found == self._seen:\n", "                if True:\n"),
    bug("a certificate counts before its key is there", TLS,
        "                self._files.check(found)\n", ""),
    bug("a key that others can read is taken", FILES,
        "    if secret and stat.S_IMODE", "    if False and stat.S_IMODE"),
    bug("a role is not checked", CALLERS,
        '            if whose == "administrator":\n', "            if False:\n"),
    bug("a session is whose ever knows its secret", CALLERS,
        "        if found.credential != caller:\n", "        if False:\n"),
    bug("a tenant sees all namespaces", CALLERS,
        "        return None if caller is None or caller.is_administrator else caller.tenants\n",
        "        return None\n"),
    bug("a tenant invalidates a namespace by its name", SHARED,
        '        elif what == "namespace":\n            self._callers.administrator()\n',
        '        elif what == "namespace":\n'),
    bug("a tenant invalidates by weights", SHARED,
        "        else:\n            self._callers.administrator()\n", "        else:\n"),
    bug("a session opens any tenant's namespace", SESSION,
        "        self._tenants.check_credential(tenant, CALLER.get())\n", ""),
    bug("a common name counts beside alternative names", CREDENTIALS,
        'facts.get("x509_subject_alternative_name") or facts.get("x509_common_name") or []',
        '[*facts.get("x509_subject_alternative_name", ()), *facts.get("x509_common_name", ())]'),
    bug("whom the configuration doesn't name is let in", CREDENTIALS,
        "        if not tenants:\n", "        if False:\n"),
    bug("a foreign namespace is found by its name", NAMESPACES,
        "            if found is None or not is_told(found):\n", "            if found is None:\n"),
    bug("a foreign request is explained", EXPLAIN,
        "            or (tenants is not None and asked.namespace.owner.tenant not in tenants)\n",
        ""),
)  # fmt: skip
TLS_BUGS: tuple[Bug, ...] = tuple(replace(each, tests=TESTS) for each in BUGS)

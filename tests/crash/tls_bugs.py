"""Bugs of TLS, of bearer tokens and of who may call, each as an edit of one file. planted.py plants
them."""

from __future__ import annotations

from dataclasses import replace

from tests.crash.bugs import Bug, bug

TLS, FILES = "kvc2/server/tls.py", "kvc2/host/private_file.py"
KEYRING, TOKEN_FILE = "kvc2/keyring.py", "kvc2/host/token_file.py"
ADDRESS = "kvc2/host/address.py"
CALLERS, CREDENTIALS = "kvc2/server/callers.py", "kvc2/server/credentials.py"
SHARED, SESSION = "kvc2/server/shared_calls.py", "kvc2/server/session_calls.py"
NAMESPACES, EXPLAIN = "kvc2/cache/namespaces.py", "kvc2/cache/explain.py"
TESTS = (
    ("tests/kvc2/server/test_tokens.py", "tests/kvc2/server/test_credentials.py"),
    ("tests/system/test_tokens.py", "tests/system/test_tls.py"),
)

BUGS = (
    bug("a client needs no certificate", TLS,
        "require_client_authentication=self._asks", "require_client_authentication=False"),
    bug("changed files of TLS don't count", TLS,
        "                if found == self._seen:\n", "                if True:\n"),
    bug("a certificate counts before its key is there", TLS,
        "                self._files.check(found)\n", ""),
    bug("a key that others can read is taken", FILES,
        "    if private and stat.S_IMODE", "    if False and stat.S_IMODE"),
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
    bug("a token is let in that isn't known", CREDENTIALS,
        "        owner = tokens.owner(token.strip())\n",
        '        owner = tokens.owner(token.strip()) or "default"\n'),
    bug("of two tokens the first counts", CREDENTIALS,
        "        if len(shown) > 1 or ", "        if "),
    bug("any scheme is Bearer", CREDENTIALS, 'kind.lower() != "bearer" or ', ""),
    bug("who shows no token is let in by what it has", CREDENTIALS,
        "        if shown or not self._asks_certificates:\n", "        if shown:\n"),
    bug("a certificate counts before a token", CREDENTIALS,
        "        if shown or not self._asks_certificates:\n",
        "        if not self._asks_certificates:\n"),
    bug("every token is an administrator's", CREDENTIALS,
        "        administrator = owner == ADMINISTRATOR\n", "        administrator = True\n"),
    bug("an administrator's token speaks for every tenant", CREDENTIALS,
        "frozenset({DEFAULT_TENANT if administrator else owner})",
        "frozenset(self._tenants if administrator else {owner})"),
    bug("a credential has its token's name", CREDENTIALS,
        '        return Credential((owner,), tenants, administrator, "bearer token")\n',
        '        return Credential((token,), tenants, administrator, "bearer token")\n'),
    bug("an error of the token file quotes it", CREDENTIALS,
        'f"{number} has another"', 'f"{token} has another"'),
    bug("an error of the token file quotes an owner", CREDENTIALS,
        'f"{ADMINISTRATOR}: entry {number} has another"',
        'f"{ADMINISTRATOR}: {owner} is another"'),
    bug("a token may be short", CREDENTIALS, "{16,512}", "{1,512}"),
    bug("changed tokens don't count", KEYRING,
        "        if digest == self._seen:\n", "        if True:\n"),
    bug("tokens that are gone still count", KEYRING,
        "        self._owners = _digested(self._parsed(content))\n",
        "        self._owners = {**self._owners, **_digested(self._parsed(content))}\n"),
    bug("a token file that can't be used leaves no token", KEYRING,
        "        content = self._content()\n        digest =",
        "        self._owners = {}\n        content = self._content()\n        digest ="),
    bug("tokens are compared until one is it", KEYRING,
        """        found = [
            owner for known, owner in self._owners.items() if hmac.compare_digest(known, digest)
        ]
        return found[0] if found else None
""",
        """        for known, owner in self._owners.items():
            if hmac.compare_digest(known, digest):
                return owner
        return None
"""),
    bug("a comparison tells a token's length", KEYRING,
        'hashlib.sha256(secret.encode(errors="surrogatepass")).digest()',
        'secret.encode(errors="surrogatepass")'),
    bug("a client shows the token that it began with", TOKEN_FILE,
        "                self._token = self._read()\n", ""),
    bug("a client sends its token in clear to any host", ADDRESS,
        "        if tls is None and not is_loopback(found.host):\n", "        if False:\n"),
)  # fmt: skip
TLS_BUGS: tuple[Bug, ...] = tuple(replace(each, tests=TESTS) for each in BUGS)

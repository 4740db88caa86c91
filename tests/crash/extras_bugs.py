"""Bugs of prompts with images in the cache, the server and the client, each as an edit of one file.
planted.py plants them one by one; those of the index are in tests/csrc/mutant_patches.py."""

from __future__ import annotations

from dataclasses import replace

from tests.crash.bugs import Bug, bug

EXTRAS, COPIED = "kvc2/cache/extras.py", "kvc2/cache/copied.py"
PINS, CHECKS = "kvc2/cache/pins.py", "kvc2/server/checks.py"
BRIDGE, RESTART = "kvc2/client/bridge.py", "kvc2/tiers/disk/restart.py"
TESTS = (
    ("tests/kvc2/cache/test_extras.py", "tests/kvc2/client/test_examples.py"),
    ("tests/kvc2/cache/test_cache_machine.py", "tests/kvc2/server/test_server.py"),
    ("tests/system/test_images.py",),
)

BUGS = (
    bug("an image's place doesn't count", EXTRAS, "PLACE.pack(place,", "PLACE.pack(0,"),
    bug("an image's length doesn't count", EXTRAS, ", each.num_tokens) +", ", 0) +"),
    bug("of the images of a block the last one counts", EXTRAS,
        "found.setdefault(block, hashlib.sha256())", "found[block] = hashlib.sha256()"),
    bug("a copy has no extras", COPIED, "copy.granted, copy.blocks.extras)", "copy.granted)"),
    bug("what comes over the wire has no extras", COPIED, "self._pages[:1], extras)",
        "self._pages[:1])"),
    bug("a copy that comes again has no extras", COPIED, "held, blocks.extras)", "held)"),
    bug("a pin is of every image", PINS, "**how, extras=extras)", "**how)"),
    bug("an unpin is of no image", PINS, "pool, asked.tokens, extras)", "pool, asked.tokens)"),
    bug("a bridge's commits have no extras", BRIDGE, "new, pages, begun)", "new, pages)"),
    bug("a restart forgets extras", RESTART,
        "        extras=stored.extras if beside else None,\n", ""),
    bug("extras count from a commit's first token", CHECKS,
        "request.extras, first, first + len(found))", "request.extras, 0, first + len(found))"),
    bug("extras may come in any order", CHECKS, "        if at < before:\n", "        if False:\n"),
    bug("keys have extras", CHECKS, "    if given:\n        raise", "    if False:\n        raise"),
)  # fmt: skip
EXTRAS_BUGS: tuple[Bug, ...] = tuple(replace(each, tests=TESTS) for each in BUGS)

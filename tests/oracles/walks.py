"""Random walks of one machine in a process of its own; prints, as JSON, what they came by:

    python -m tests.oracles.walks MODULE:MACHINE EXAMPLES

Hypothesis draws some values from the constants of whatever modules of ours are imported, so that
the same seed walks differently in each selection of tests; here it is the same in all of them.
"""

import importlib
import json
import sys

from tests.csrc.test_index_machine import Walk, walk
from tests.oracles.machines import SEEN

if __name__ == "__main__":
    module, _, machine = sys.argv[1].partition(":")
    lives = getattr(importlib.import_module(module), machine)
    walk(Walk(int(sys.argv[2])), same=True, lives=lives)
    json.dump(SEEN, sys.stdout)

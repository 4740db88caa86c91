"""The default walk of test_index_machine.py in a process of its own: prints, as JSON, what it came
by.

Hypothesis draws some values from the constants of whatever modules of ours are imported, so that
the same seed walks differently in each selection of tests; here it is the same in all of them.
"""

import json
import sys

from tests.csrc.test_index_machine import WALK, walk
from tests.oracles.machines import SEEN

if __name__ == "__main__":
    walk(WALK, same=True)
    json.dump(SEEN, sys.stdout)

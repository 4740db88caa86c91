"""The default walk of tests/test_index_machine.py in a process of its own: prints, as JSON, what it
came by.

Hypothesis draws some values from the constants of whatever modules of ours are imported, so that
the same seed walks differently in each selection of tests; here it is the same in all of them.
"""

import json
import sys

from tests.machines import SEEN
from tests.test_index_machine import WALK, walk

if __name__ == "__main__":
    walk(WALK, same=True)
    json.dump(SEEN, sys.stdout)

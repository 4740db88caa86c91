"""Pages of memory that are kept free: those of dead blocks, and up to the watermarks.

Keeps no state of its own. Not here: pages freed on the disk (disk_writer.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvc2 import _core
from kvc2.config import ServeConfig
from kvc2.moving.gpu_pools import GpuPool
from kvc2.tiers.pools import Pools

REAP_PAGES = 4096  # a call: about 1 ms in the index


class FreePages:
    """On the event loop. `gpus`: the open gpu pools. The watermarks are shares of a pool."""

    def __init__(
        self, index: _core.Index, pools: Pools, gpus: Mapping[int, GpuPool], config: ServeConfig
    ) -> None:
        self._index = index
        self._pools = pools
        self._gpus = gpus
        self.low_watermark, self.high_watermark = config.low_watermark, config.high_watermark

    def reap(self) -> None:
        """Free the dead blocks' pages in memory, as far as nothing pins them."""
        ids = [gpu.id for gpu in self._gpus.values()]
        ids += self._pools.ids("cpu")
        while sum(self._index.reap(each, REAP_PAGES).pages.size for each in ids):
            pass

    def keep(self, pool: int) -> None:
        """Below the low watermark: drop copies that a slower tier also holds up to the high one, so
        that whoever needs a page finds one. Last copies go only for a page that is needed now."""
        if self._index.pool_counts(pool).free < self.low_pages(pool):
            self._index.keep_free(pool, self._pages(pool, self.high_watermark))

    def low_pages(self, pool: int) -> int:
        """The low watermark, in pages."""
        return self._pages(pool, self.low_watermark)

    def _pages(self, pool: int, share: float) -> int:
        """Of a share; a pool that is closed or empty has none."""
        return math.ceil(self._index.pool_counts(pool).pages * share)

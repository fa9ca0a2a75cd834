"""What the caches of generation have in common: a layer's keys and values in buffers with room to grow."""

import weakref
from typing import Any

from transformers.cache_utils import CacheLayerMixin


class BufferLayer(CacheLayerMixin):
    """Keys and values of one attention layer, [rows, heads, columns, head size], allocated ahead.

    Args:
        owner: the cache, which knows the rows; the layers only hold them.
    """

    is_sliding = False  # sliding-window layers keep every column too; their mask hides the old ones

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        # No circle: a cache is freed when its generation ends, not when the garbage collector comes by.
        self._owner = weakref.proxy(owner)

    def move(self, source: int, target: int, columns: slice) -> None:
        """Copy the columns of a row over those of another."""
        for buffer in (self.keys, self.values):
            buffer[target, :, columns] = buffer[source, :, columns]

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """There is no limit."""
        return -1

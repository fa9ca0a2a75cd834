"""Norms of every channel's column of down_proj, read from the shards in blocks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrow.checkpoint.dtypes import ITEM_BYTES, raw_dtype, to_float32
from regrow.checkpoint.reader import CheckpointReader
from regrow.types import MlpSite

# Small enough to stay in a core's cache while it is widened, squared and summed.
_BLOCK_BYTES = 1 << 19


@dataclass(frozen=True)
class ChannelNorms:
    """Per channel, each [F]: the L1 and the L2 norm of its column of down_proj, in float64."""

    l1: NDArray[np.float64]
    l2: NDArray[np.float64]


def channel_norms(reader: CheckpointReader, site: MlpSite) -> ChannelNorms:
    """Both norms in one pass over down_proj, the only tensor that is read.

    Memory is a block of half a megabyte, whatever the tensor's size. Sums run in float32 over the rows of a
    block and in float64 across blocks: relative error below 1e-6.
    """
    info = reader.tensors[site.down.name]
    row_bytes = site.width * ITEM_BYTES[info.dtype]
    step = max(1, _BLOCK_BYTES // row_bytes)
    first = (site.down.expert or 0) * site.hidden_size
    buffer = np.empty((step, site.width), raw_dtype(info.dtype))
    absolute, squares = np.zeros(site.width), np.zeros(site.width)
    for begin in range(0, site.hidden_size, step):
        block = buffer[: min(step, site.hidden_size - begin)]
        reader.read_into(info.name, block.data.cast("B"), (first + begin) * row_bytes)
        values = to_float32(block, info.dtype)
        absolute += np.abs(values).sum(axis=0)
        squares += np.einsum("ij,ij->j", values, values)
    return ChannelNorms(absolute, np.sqrt(squares))

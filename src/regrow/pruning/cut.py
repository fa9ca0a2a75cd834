"""Kept rows and columns of a stored tensor, read in blocks and passed on bit for bit."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from regrow.checkpoint.dtypes import ITEM_BYTES, raw_dtype
from regrow.checkpoint.reader import CheckpointReader
from regrow.checkpoint.shard_file import PIECE_BYTES, OutputTensor
from regrow.checkpoint.writer import whole_tensor
from regrow.families import site_tensors
from regrow.types import MlpSite, TensorInfo

Index = NDArray[np.intp]


@dataclass
class Cut:
    """What stays of one tensor, seen as a stack of matrices (one, unless it holds stacked experts).

    Attributes:
        by_rows: whether rows are chosen (gate, up and their biases) or columns (down).
        kept: entry of the stack -> ascending indices that stay.
    """

    by_rows: bool
    kept: dict[int, Index] = field(default_factory=dict)


def plan_cuts(sites: Iterable[MlpSite], kept: Mapping[str, tuple[int, ...]]) -> dict[str, Cut]:
    """Tensor name -> what stays of it, for the sites that the plan names."""
    cuts: dict[str, Cut] = {}
    for site in sites:
        if site.name not in kept:
            continue
        channels = np.asarray(kept[site.name], dtype=np.intp)
        for ref in site_tensors(site):
            cut = cuts.setdefault(ref.name, Cut(by_rows=ref is not site.down))
            entry = ref.expert or 0
            before = cut.kept.get(entry, np.empty(0, np.intp))
            # A fused tensor is named twice; the up half starts F rows further down.
            cut.kept[entry] = np.concatenate([before, channels + ref.start])
    return cuts


def cut_tensor(reader: CheckpointReader, name: str, cut: Cut) -> OutputTensor:
    """A tensor of the pruned checkpoint, to be streamed from its parent's.

    A cut that keeps everything is a plain copy.
    """
    info = reader.tensors[name]
    entries, rows, columns = as_stack(info, cut)
    lengths = {len(kept) for kept in cut.kept.values()}
    if set(cut.kept) != set(range(entries)) or len(lengths) != 1:
        raise ValueError(f"the cut of {name} does not cover its {entries} entries evenly")
    (length,) = lengths
    if length == (rows if cut.by_rows else columns):
        return whole_tensor(reader, name)
    shape = cut_shape(info, cut)
    return OutputTensor(name, info.dtype, shape, lambda: _pieces(reader, info, cut))


def cut_shape(info: TensorInfo, cut: Cut) -> tuple[int, ...]:
    """The tensor's shape after the cut."""
    length = len(next(iter(cut.kept.values())))
    axis = (len(info.shape) - 2 if len(info.shape) > 1 else 0) if cut.by_rows else len(info.shape) - 1
    return (*info.shape[:axis], length, *info.shape[axis + 1 :])


def as_stack(info: TensorInfo, cut: Cut) -> tuple[int, int, int]:
    """Entries, rows and columns of a tensor seen as a stack of matrices; a bias is one column."""
    if len(info.shape) == 1:
        return 1, info.shape[0], 1
    *stack, rows, columns = info.shape
    return math.prod(stack), rows, columns


def _pieces(reader: CheckpointReader, info: TensorInfo, cut: Cut) -> Iterator[memoryview]:
    entries, rows, columns = as_stack(info, cut)
    item, dtype = ITEM_BYTES[info.dtype], raw_dtype(info.dtype)
    block_rows = max(1, min(rows, PIECE_BYTES // max(1, columns * item)))
    source = np.empty((block_rows, columns), dtype)
    target = np.empty_like(source)
    for entry in range(entries):
        kept = cut.kept[entry]
        for begin in range(0, rows, block_rows):
            end = min(begin + block_rows, rows)
            if cut.by_rows:
                first, last = np.searchsorted(kept, (begin, end))
                if first == last:
                    continue
                chosen, axis = kept[first:last] - begin, 0
                out = target[: last - first]
            else:
                chosen, axis = kept, 1
                out = target.reshape(-1)[: (end - begin) * len(kept)].reshape(end - begin, len(kept))
            block = source[: end - begin]
            reader.read_into(info.name, block.data.cast("B"), (entry * rows + begin) * columns * item)
            # The indices were checked; "clip" only spares numpy a buffered copy.
            np.take(block, chosen, axis=axis, out=out, mode="clip")
            yield out.data.cast("B")

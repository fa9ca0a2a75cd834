"""A copy of a checkpoint in which some tensors have new values."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.checkpoint.dtypes import FLOAT_DTYPES, from_float32
from regrow.checkpoint.reader import CheckpointReader
from regrow.checkpoint.shard_file import PIECE_BYTES, OutputTensor
from regrow.checkpoint.writer import whole_tensor, write_checkpoint
from regrow.errors import RunError, UserError
from regrow.types import TensorInfo

Values = NDArray[Any] | Callable[[], NDArray[Any]]


def overlay_checkpoint(
    *,
    base: str | Path,
    out: str | Path,
    replacements: Mapping[str, Values],
    shards: int | None = None,
    max_shard_size: int | str | None = None,
) -> dict[str, Any]:
    """Write `base` again with new values for some tensors.

    Everything else (vision, multi-token prediction, config, tokenizer) is copied bit for bit, and every
    tensor keeps its dtype: new values are rounded to nearest, ties to even.

    Args:
        base: the model folder.
        out: the new folder; it must not exist, or be empty.
        replacements: checkpoint name -> float32 values of the stored shape, or a function that makes them
            when they are about to be written.
        shards: exactly so many files; `max_shard_size`: or files of at most this size; by default as many
            files as `base` has.
        max_shard_size: see `shards`.

    Raises:
        UserError: a name is not in the checkpoint, or its tensor is no floating-point tensor.
        RunError: values have another shape, or are not finite.
    """
    reader = CheckpointReader(base)
    for name in replacements:
        if name not in reader.tensors:
            raise UserError(f"{base} holds no tensor {name!r}; replace only what is there.")
        if reader.tensors[name].dtype not in FLOAT_DTYPES:
            raise UserError(f"{name!r} is stored as {reader.tensors[name].dtype} and cannot take new values.")
    if shards is None and max_shard_size is None:
        shards = len(reader.shard_names)
    tensors = [
        replaced_tensor(info, replacements[name]) if name in replacements else whole_tensor(reader, name)
        for name, info in reader.tensors.items()
    ]
    report = write_checkpoint(
        out=out,
        tensors=tensors,
        config=reader.config,
        parent=reader,
        shards=shards,
        max_shard_size=max_shard_size,
    )
    return {**report, "replaced": len(replacements)}


def replaced_tensor(info: TensorInfo, values: Values, shape: tuple[int, ...] | None = None) -> OutputTensor:
    """A tensor with `info`'s name and dtype whose values are given, or made when it is its turn."""
    shape = info.shape if shape is None else shape

    def pieces() -> Iterator[memoryview]:
        array = np.asarray(values() if callable(values) else values)
        if array.shape != shape:
            raise RunError(f"The new {info.name} has the shape {list(array.shape)} instead of {list(shape)}.")
        flat = array.reshape(-1)
        step = PIECE_BYTES // 4
        for begin in range(0, flat.size, step):
            piece = flat[begin : begin + step]
            if not np.isfinite(piece).all():
                raise RunError(f"The new {info.name} holds values that are not finite; nothing was written.")
            raw = from_float32(piece, info.dtype)
            if info.dtype == "F16" and not np.isfinite(raw).all():
                raise RunError(f"The new {info.name} does not fit into F16; nothing was written.")
            yield raw.data.cast("B")

    return OutputTensor(info.name, info.dtype, shape, pieces, computed=callable(values))

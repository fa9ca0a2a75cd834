"""A pruned checkpoint's tensors against its parent's, streamed: untouched, cut, refitted or trained."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.checkpoint.dtypes import ITEM_BYTES, raw_dtype
from regrow.checkpoint.reader import CheckpointReader
from regrow.checkpoint.shard_file import PIECE_BYTES
from regrow.types import MlpSite, TensorRef

Matrix = NDArray[Any]


@dataclass
class Comparison:
    """What became of each tensor or MLP, and what is wrong.

    Attributes:
        untouched: tensors that are bit-identical.
        cut: MLP sites that are a plain subset of their parent's channels (or all of them).
        refitted: sites whose gate and up are such a subset and whose down has new values.
        trained: tensors and sites with other values, where training is allowed for.
        kept: site -> parent channels, for every cut or refitted site.
        problems: one sentence each.
    """

    untouched: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    refitted: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    kept: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def compare_tensor(
    child: CheckpointReader,
    name: str,
    parent: CheckpointReader,
    parent_name: str,
    trained: bool,
    into: Comparison,
) -> None:
    """A tensor that pruning does not touch: dtype, shape and every byte."""
    mine, theirs = child.tensors[name], parent.tensors[parent_name]
    if mine.shape != theirs.shape:
        into.problems.append(
            f"{name} has the shape {list(mine.shape)} and its parent's {list(theirs.shape)}."
        )
    elif mine.dtype != theirs.dtype:
        into.problems.append(f"{name} is stored as {mine.dtype} and its parent's as {theirs.dtype}.")
    elif _same_bytes(child, name, parent, parent_name):
        into.untouched.append(name)
    elif trained:
        into.trained.append(name)
    else:
        into.problems.append(f"{name} differs from its parent's, although pruning does not touch it.")


def compare_site(
    child: CheckpointReader,
    site: MlpSite,
    parent: CheckpointReader,
    parent_site: MlpSite,
    trained: bool,
    into: Comparison,
) -> None:
    """One MLP: are its channels some of its parent's, gate, up and down alike?"""
    if site.width > parent_site.width or site.hidden_size != parent_site.hidden_size:
        into.problems.append(f"{site.name} is larger than its parent's.")
        return
    for ref, parent_ref in _pairs(site, parent_site):
        if (ref is None) != (parent_ref is None):
            into.problems.append(f"{site.name} and its parent's do not have the same biases.")
            return
        if ref is not None and parent_ref is not None:
            mine, theirs = child.tensors[ref.name].dtype, parent.tensors[parent_ref.name].dtype
            if mine != theirs:
                into.problems.append(f"{ref.name} is stored as {mine} and its parent's as {theirs}.")
                return
    kept = _match_channels(_channel_hashes(child, site), _channel_hashes(parent, parent_site))
    if kept is None:
        if trained:
            into.trained.append(site.name)
        else:
            into.problems.append(f"{site.name} has gate and up rows that are not its parent's.")
        return
    into.kept[site.name] = kept
    if kept != sorted(kept):
        into.problems.append(f"{site.name} has its parent's channels in another order.")
    if _same_columns(child, site, parent, parent_site, np.asarray(kept, np.intp)):
        into.cut.append(site.name)
    else:
        into.refitted.append(site.name)


def non_finite(reader: CheckpointReader, name: str) -> bool:
    """Whether a floating-point tensor holds a NaN or an infinity; reads it in pieces."""
    info = reader.tensors[name]
    if info.dtype not in ("BF16", "F16", "F32", "F64"):
        return False
    for piece in _pieces(reader, name):
        values = np.frombuffer(piece, raw_dtype(info.dtype))
        if info.dtype == "BF16":
            if ((values & 0x7F80) == 0x7F80).any():
                return True
        elif not np.isfinite(values).all():
            return True
    return False


def _pairs(site: MlpSite, parent: MlpSite) -> Iterator[tuple[TensorRef | None, TensorRef | None]]:
    for name in ("gate", "up", "down", "gate_bias", "up_bias"):
        yield getattr(site, name), getattr(parent, name)


def _same_bytes(a: CheckpointReader, a_name: str, b: CheckpointReader, b_name: str) -> bool:
    pairs = zip(_pieces(a, a_name), _pieces(b, b_name), strict=True)
    return all(mine == theirs for mine, theirs in pairs)


def _pieces(reader: CheckpointReader, name: str) -> Iterator[bytes]:
    nbytes = reader.tensors[name].nbytes
    for begin in range(0, nbytes, PIECE_BYTES):
        yield reader.read_bytes(name, begin, min(PIECE_BYTES, nbytes - begin))


def _channel_hashes(reader: CheckpointReader, site: MlpSite) -> list[bytes]:
    """One digest per channel, of its gate row, its up row and their biases."""
    digests = [hashlib.blake2b(digest_size=16) for _ in range(site.width)]
    for ref in (site.gate, site.up, site.gate_bias, site.up_bias):
        if ref is None:
            continue
        columns = 1 if ref in (site.gate_bias, site.up_bias) else site.hidden_size
        position = 0
        for block in rows_of(reader, ref, ref.start, site.width, columns):
            for row in block:
                digests[position].update(row.data)
                position += 1
    return [digest.digest() for digest in digests]


def _match_channels(mine: list[bytes], theirs: list[bytes]) -> list[int] | None:
    """Parent's index of every channel, or None if one is not there; equals are taken in order."""
    places: dict[bytes, list[int]] = {}
    for index, digest in reversed(list(enumerate(theirs))):
        places.setdefault(digest, []).append(index)
    kept: list[int] = []
    for digest in mine:
        if not places.get(digest):
            return None
        kept.append(places[digest].pop())
    return kept


def _same_columns(
    child: CheckpointReader,
    site: MlpSite,
    parent: CheckpointReader,
    parent_site: MlpSite,
    kept: NDArray[np.intp],
) -> bool:
    step = max(
        1, PIECE_BYTES // (parent_site.width * ITEM_BYTES[parent.tensors[parent_site.down.name].dtype])
    )
    mine = rows_of(child, site.down, 0, site.hidden_size, site.width, step)
    theirs = rows_of(parent, parent_site.down, 0, site.hidden_size, parent_site.width, step)
    return all(
        np.array_equal(_bits(a), _bits(np.take(b, kept, axis=1))) for a, b in zip(mine, theirs, strict=True)
    )


def _bits(values: Matrix) -> Matrix:
    return np.ascontiguousarray(values).view(np.uint8)


def rows_of(
    reader: CheckpointReader, ref: TensorRef, first: int, rows: int, columns: int, step: int | None = None
) -> Iterator[Matrix]:
    """Blocks of consecutive rows of one projection, as stored; each block is valid until the next."""
    info = reader.tensors[ref.name]
    item = ITEM_BYTES[info.dtype]
    step = step or max(1, PIECE_BYTES // (columns * item))
    first += (ref.expert or 0) * (info.shape[-2] if len(info.shape) > 2 else 0)
    buffer = np.empty((min(step, rows), columns), raw_dtype(info.dtype))
    for begin in range(0, rows, step):
        block = buffer[: min(step, rows - begin)]
        reader.read_into(ref.name, block.data.cast("B"), (first + begin) * columns * item)
        yield block


def shared_settings(child: Mapping[str, Any], parent: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted keys that both configs have, with other values."""
    for key in child.keys() & parent.keys():
        mine, theirs = child[key], parent[key]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from shared_settings(mine, theirs, f"{path}{key}.")
        elif mine != theirs:
            yield f"{path}{key}"

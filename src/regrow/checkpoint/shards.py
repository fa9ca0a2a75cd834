"""How tensors are spread over files: an exact number of balanced shards, or a maximum size."""

import re
from collections.abc import Mapping
from itertools import accumulate

import numpy as np

from regrow.errors import UserError

MOST_SHARDS = 1_000
_MOST_ATOMS = 1_024  # groups of neighbouring tensors that the balancing tells apart


def shard_files(
    sizes: Mapping[str, int], *, shards: int | None = None, max_shard_size: int | str | None = None
) -> dict[str, list[str]]:
    """File name -> tensor names, in the order of `sizes` (tensor name -> bytes).

    Either exactly `shards` files or files of at most `max_shard_size` (bytes, or "5GB"), filled greedily as
    huggingface_hub does; 5 GB where neither is given.

    Raises:
        UserError: both are given, more shards than tensors, or a size that nobody can parse.
    """
    if shards is not None and max_shard_size is not None:
        raise UserError("A number of shards and a maximum shard size exclude each other; give one of them.")
    if shards is None:
        return _by_size(sizes, "5GB" if max_shard_size is None else max_shard_size)
    if not 1 <= shards <= min(len(sizes), MOST_SHARDS):
        raise UserError(
            f"{shards} shards cannot be made of {len(sizes)} tensors; ask for 1 to "
            f"{min(len(sizes), MOST_SHARDS)}."
        )
    names = list(sizes)
    bounds = balanced_bounds(list(sizes.values()), shards)
    if shards == 1:
        return {"model.safetensors": names}
    return {
        f"model-{part + 1:05d}-of-{shards:05d}.safetensors": names[bounds[part] : bounds[part + 1]]
        for part in range(shards)
    }


def balanced_bounds(sizes: list[int], parts: int) -> list[int]:
    """Bounds (length parts + 1) that cut a sequence into non-empty runs of balanced total size.

    Minimises the sum of the squared run sizes exactly, by dynamic programming: one run that cannot be made
    smaller (an embedding) does not stop the others from being balanced. Very long sequences are first merged
    into groups of neighbours that are small against a run.
    """
    starts = _atom_starts(sizes, max(_MOST_ATOMS, 2 * parts))
    prefix = np.array([0, *accumulate(sizes)], dtype=np.float64)[[*starts, len(sizes)]]
    prefix /= max(prefix[-1], 1.0)
    n = len(starts)
    square = (prefix[None, :] - prefix[:, None]) ** 2  # [begin, end]
    square[np.tril_indices(n + 1)] = np.inf
    best = square[0]
    choices = []
    for _ in range(parts - 1):
        total = best[:, None] + square
        choice = total.argmin(axis=0)
        choices.append(choice)
        best = total[choice, np.arange(n + 1)]
    bounds = [n]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    bounds.append(0)
    return [[*starts, len(sizes)][bound] for bound in reversed(bounds)]


def _atom_starts(sizes: list[int], most: int) -> list[int]:
    if len(sizes) <= most:
        return list(range(len(sizes)))
    # An atom closes at this size or count, so there are at most `most` of them.
    size_limit, count_limit = 2 * sum(sizes) / most, 2 * len(sizes) / most
    starts, size, count = [0], 0, 0
    for i, this in enumerate(sizes):
        if count and (size + this > size_limit / 2 or count >= count_limit):
            starts.append(i)
            size = count = 0
        size += this
        count += 1
    return starts


def _by_size(sizes: Mapping[str, int], max_shard_size: int | str) -> dict[str, list[str]]:
    from huggingface_hub import split_state_dict_into_shards_factory

    if isinstance(max_shard_size, str):
        match = re.fullmatch(r"\s*\d{1,9}(?:\.\d{1,9})?\s*(?:TB|GB|MB|KB)\s*", max_shard_size, re.IGNORECASE)
        sensible = match is not None and re.search(r"[1-9]", max_shard_size) is not None
    else:
        sensible = max_shard_size > 0
    if not sensible:
        raise UserError(f"{max_shard_size!r:.40} is no shard size; write it like 500MB or 5GB.")
    split = split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return {file: list(names) for file, names in split.filename_to_tensors.items()}

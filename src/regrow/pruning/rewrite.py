"""Cut a checkpoint to a plan, straight from its parent's shards, tensor by tensor.

The model is never instantiated: peak memory is a few pieces of 4 MiB, whatever the model's size. Rows of
gate_proj and up_proj (and their biases) and columns of down_proj go together; every other tensor is copied
inside the kernel, each in its own dtype.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regrow.checkpoint.overlay import replaced_tensor
from regrow.checkpoint.reader import CheckpointReader
from regrow.checkpoint.shard_file import OutputTensor
from regrow.checkpoint.writer import whole_tensor, write_checkpoint
from regrow.errors import UserError
from regrow.families import find_family, mlp_sites, pruned_config, require_whole
from regrow.pruning.cut import cut_shape, cut_tensor, plan_cuts
from regrow.types import MlpSite, PruningPlan


def rewrite_checkpoint(
    *,
    parent: str | Path | CheckpointReader,
    plan: PruningPlan,
    out: str | Path,
    replacements: Mapping[str, Callable[[], NDArray[Any]]] | None = None,
    shards: int | None = None,
    max_shard_size: int | str | None = None,
    mtp: Literal["prune", "drop"] = "prune",
) -> dict[str, Any]:
    """Write the pruned checkpoint of a plan.

    Args:
        parent: the parent's folder, or its reader.
        plan: kept channels per site; sites of kinds that the plan has no width for stay whole.
        out: the new model folder; it must not exist, or be empty.
        replacements: tensor name -> function that makes new float32 values of the cut shape (a refitted
            `down_proj`), called when the tensor is about to be written.
        shards: exactly so many files of balanced size.
        max_shard_size: or files of at most this size, e.g. "5GB".
        mtp: `prune` cuts the multi-token-prediction layer with the trunk; `drop` leaves its tensors out and
            sets the config's count of such layers to 0.

    Returns:
        What was written: `out, parent, width, mtp, shards, num_tensors, weight_bytes, main_bytes, mtp_bytes,
        seconds, notes`.

    Raises:
        UserError: the checkpoint is incomplete or contradicts its config, the plan is not for it, or the
            output folder is taken.
        RunError: full disk, or refitted values that are not finite.
    """
    start = time.monotonic()
    reader = parent if isinstance(parent, CheckpointReader) else CheckpointReader(parent)
    family = find_family(reader.config)
    faults = require_whole(reader.config, reader.tensors)
    sites = mlp_sites(reader.config, reader.tensors)
    notes: list[str] = []
    if unforeseen := faults.extra + faults.harmless:
        notes.append(f"Carried along although the config does not foresee it: {', '.join(unforeseen[:5])}.")
    has_mtp = any(family.is_mtp(name) for name in reader.tensors)
    if family.num_mtp_layers(reader.config) and not has_mtp:
        mtp = "drop"
        notes.append(
            "The parent declares a multi-token-prediction head that it does not hold; no longer declared."
        )
    elif has_mtp and mtp == "drop":
        notes.append("The multi-token-prediction head was dropped; speculative decoding with it is gone.")
    if mtp == "drop":
        sites = [site for site in sites if not family.is_mtp(site.down.name)]
    chosen = check_plan(plan, sites, reader)
    cuts = plan_cuts(sites, chosen)
    replacements = dict(replacements or {})
    if unknown := sorted(set(replacements) - {site.down.name for site in sites}):
        raise UserError(f"{unknown[0]!r} is no down_proj of the model; only those can be refitted.")

    tensors: list[OutputTensor] = []
    for name, info in reader.tensors.items():
        if mtp == "drop" and family.is_mtp(name):
            continue
        if name in replacements:
            shape = cut_shape(info, cuts[name]) if name in cuts else info.shape
            tensors.append(replaced_tensor(info, replacements[name], shape))
        elif name in cuts:
            tensors.append(cut_tensor(reader, name, cuts[name]))
        else:
            tensors.append(whole_tensor(reader, name))
    widths = {kind: width for kind, width in plan.width.items() if any(s.kind == kind for s in sites)}
    config = pruned_config(reader.config, widths, mtp=mtp)  # type: ignore[arg-type]
    written = write_checkpoint(
        out=out,
        tensors=tensors,
        config=config,
        parent=reader,
        shards=shards,
        max_shard_size=max_shard_size,
    )
    if reader.left_behind:
        notes.append(f"Left behind with the parent: {', '.join(reader.left_behind)}.")
    mtp_bytes = sum(tensor.nbytes for tensor in tensors if family.is_mtp(tensor.name))
    return {
        "out": str(out),
        "parent": plan.parent,
        "width": widths,
        "mtp": ("dropped" if mtp == "drop" else "pruned") if has_mtp else "none",
        **written,
        "main_bytes": written["weight_bytes"] - mtp_bytes,
        "mtp_bytes": mtp_bytes,
        "refitted": len(replacements),
        "seconds": round(time.monotonic() - start, 3),
        "notes": notes,
    }


def check_plan(
    plan: PruningPlan, sites: Sequence[MlpSite], reader: CheckpointReader
) -> dict[str, tuple[int, ...]]:
    """The kept channels of the sites to be cut, after checking the plan against its checkpoint.

    Raises:
        UserError: the plan was made for another checkpoint, misses a site, or names impossible channels.
    """
    if plan.parent != reader.fingerprint():
        raise UserError(f"The plan was made for another checkpoint than {reader.folder}; make it again.")
    by_kind: dict[str, list[MlpSite]] = {}
    for site in sites:
        by_kind.setdefault(site.kind, []).append(site)
    if "dense" in plan.width and "mtp" in by_kind and plan.width.get("mtp") != plan.width["dense"]:
        raise UserError(
            "The plan leaves the multi-token-prediction layer at another width than the trunk; "
            "prune it to the same width or drop it."
        )
    chosen: dict[str, tuple[int, ...]] = {}
    for kind, width in plan.width.items():
        for site in by_kind.get(kind, []):
            kept = plan.kept.get(site.name)
            if kept is None or len(kept) != width:
                raise UserError(f"The plan does not say which {width} channels of {site.name} stay; mend it.")
            indices = np.asarray(kept)
            if (np.diff(indices) <= 0).any() or indices[0] < 0 or indices[-1] >= site.width:
                raise UserError(
                    f"The plan's channels of {site.name} do not ascend within its {site.width}; mend it."
                )
            chosen[site.name] = kept
    if not chosen:
        raise UserError(f"The plan fits no MLP of {reader.folder}; make it for this model.")
    return chosen

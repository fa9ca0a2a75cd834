"""From a checkpoint and its statistics to a pruned checkpoint: score, select, refit, rewrite."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regrow.checkpoint import CheckpointReader
from regrow.errors import UserError
from regrow.families import find_family, main_kinds, mlp_sites
from regrow.files import sha256_json
from regrow.progress import Progress, say
from regrow.pruning.criteria import CRITERIA, Channels, Criterion, find_criterion
from regrow.pruning.norms import channel_norms
from regrow.pruning.plan import load_plan, save_plan
from regrow.pruning.refit import Refit, Shift, refit_down
from regrow.pruning.rewrite import rewrite_checkpoint
from regrow.pruning.select import check_width, top_channels
from regrow.pruning.statistics import Statistics, mode_behind
from regrow.types import MlpSite, PruningPlan


class Measured(Protocol):
    """Statistics of a site, in a file or in memory."""

    def has(self, site: str, field: str) -> bool:
        """Whether that was counted."""

    def read(self, site: str, field: str) -> NDArray[Any]:
        """One tensor of the layout."""

    def num_tokens(self, site: str) -> tuple[int, int]:
        """Tokens that reached the site: calibration, held out."""


_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}


def prune(
    *,
    model: Path,
    out: Path,
    width: int,
    step: int = 128,
    criterion: str = "obs",
    statistics: Path | None = None,
    plan: Path | None = None,
    refit: bool = True,
    shards: int | None = None,
    max_shard_size: str | None = None,
    mtp: Literal["prune", "drop"] = "prune",
    seed: int = 0,
) -> dict[str, Any]:
    """Prune a checkpoint's MLPs to one width.

    One site's weights and statistics are in memory at a time; the refit of a layer runs when its down_proj is
    about to be written.

    Args:
        model: folder of the parent checkpoint.
        out: the new model folder.
        width: channels kept per MLP, a multiple of `step`.
        criterion: key of `CRITERIA`; ignored with `plan`.
        statistics: file of `calibrate`, of this model.
        plan: a plan file that says which channels stay.
        refit: refit down_proj by least squares; needs statistics with correlations.
        shards, max_shard_size, mtp: see `rewrite_checkpoint`.
        seed: for criteria that draw.

    Returns:
        The report of `rewrite_checkpoint` and `criterion, citation, refit, width_before, layers (a list with
        name, error_before, error_after, rho, condition, kept_hash), plan, notes, seconds_by_part`. The plan
        is saved beside `out` as `plan.json`.

    Raises:
        UserError: impossible width, unknown criterion, missing or foreign statistics.
    """
    start = time.monotonic()
    reader = CheckpointReader(model)
    family = find_family(reader.config)
    every = mlp_sites(reader.config, reader.tensors)
    kinds = main_kinds(reader.config, every)
    sites = [
        site for site in every if site.kind in kinds and not (mtp == "drop" and family.is_mtp(site.down.name))
    ]
    notes = check_width(width, step, max(site.width for site in sites))
    parent = reader.fingerprint()
    measured = Statistics(statistics) if statistics is not None else None
    if measured is not None:
        notes += check_statistics(measured, parent, sites)
        mode = measured.header["mode"]
        if mode != "parent" and (plan is not None or not refit or mode != mode_behind(width, criterion)):
            raise UserError(
                f"{measured.path} was gathered {mode}; prune like that, without a plan, or calibrate again."
            )
    if plan is not None:
        chosen = load_plan(plan)
        if set(chosen.width.values()) != {width}:
            raise UserError(f"The plan {plan} is for another width than {width}; give the plan's width.")
    else:
        chosen = choose_channels(
            reader, sites, width, find_criterion(criterion), measured, seed, parent, notes
        )
    scored = time.monotonic()
    layers: dict[str, dict[str, Any]] = {site.name: {"name": site.name} for site in sites}
    replacements: dict[str, Callable[[], NDArray[Any]]] = {}
    if refit and width < sites[0].width:
        if measured is None or not measured.header["correlations"]:
            raise UserError(
                "The refit needs statistics with correlations; run calibrate with correlations: true, or ask "
                "for refit: false."
            )
        replacements = _refits(reader, sites, chosen, measured, layers, notes)
    report = rewrite_checkpoint(
        parent=reader,
        plan=chosen,
        out=out,
        replacements=replacements,
        shards=shards,
        max_shard_size=max_shard_size,
        mtp=mtp,
    )
    save_plan(chosen, out.parent / "plan.json")
    for note in notes:
        say(f"prune: {note}")
    return {
        **report,
        "criterion": chosen.origin.get("criterion"),
        "citation": chosen.origin.get("citation"),
        "refit": bool(replacements),
        "width_before": max(site.width for site in sites),
        "layers": list(layers.values()),
        "plan": str(out.parent / "plan.json"),
        "plan_hash": sha256_json(dict(chosen.kept)),
        "notes": [*report["notes"], *notes],
        "seconds": round(time.monotonic() - start, 3),
        "seconds_by_part": {
            "score": round(scored - start, 3),
            "refit_and_write": round(time.monotonic() - scored, 3),
        },
    }


def check_statistics(measured: Statistics, parent: str, sites: list[MlpSite]) -> list[str]:
    """Notes on statistics, after refusing those that do not belong to this model.

    Raises:
        UserError: made on another model, or sites are missing.
    """
    if measured.header["parent"] != parent:
        raise UserError(f"{measured.path} holds the statistics of another model; run calibrate on this one.")
    notes = []
    for site in sites:
        if site.name not in measured.sites and site.kind == "mtp":
            continue
        if site.name not in measured.sites:
            raise UserError(f"{measured.path} has no statistics of {site.name}; run calibrate again.")
        dead = int((measured.read(site.name, "sum_squares") == 0).sum())
        if dead:
            notes.append(f"{site.name}: {dead} of {site.width} channels never fired in calibration.")
        elif site.kind == "expert" and measured.num_tokens(site.name)[0] < site.width:
            notes.append(f"{site.name}: only {measured.num_tokens(site.name)[0]} tokens reached it.")
    return notes


def choose_channels(
    reader: CheckpointReader,
    sites: list[MlpSite],
    width: int,
    criterion: Criterion,
    measured: Statistics | None,
    seed: int,
    parent: str,
    notes: list[str],
) -> PruningPlan:
    """Score every site and keep its best channels.

    Raises:
        UserError: the criterion needs statistics that are not there.
    """
    kept: dict[str, tuple[int, ...]] = {}
    with Progress(f"score ({criterion.name})", len(sites), "sites") as progress:
        for position, site in enumerate(sites):
            used = _criterion_for(site, criterion, measured, notes)
            site_seed = seed * 1_000_003 + position
            kept[site.name] = tuple(choose_site(reader, site, width, used, measured, site_seed).tolist())
            progress.advance(1)
    origin: dict[str, Any] = {"criterion": criterion.name, "citation": criterion.citation, "seed": seed}
    if measured is not None and criterion.needs_statistics:
        origin["statistics"] = measured.hash()
        origin["num_tokens"] = measured.header["num_tokens"]
    kinds = {site.kind for site in sites}
    return PruningPlan(parent=parent, width=dict.fromkeys(sorted(kinds), width), kept=kept, origin=origin)


def choose_site(
    reader: CheckpointReader,
    site: MlpSite,
    width: int,
    criterion: Criterion,
    measured: Measured | None,
    seed: int,
) -> Tensor:
    """Ascending indices [width] of the channels of one site that stay.

    Raises:
        UserError: the criterion needs statistics that are not there.
    """
    channels = site_channels(reader, site, criterion, measured, seed)
    return top_channels(criterion.score(channels, width), width, site.name)


def _criterion_for(
    site: MlpSite, criterion: Criterion, measured: Statistics | None, notes: list[str]
) -> Criterion:
    """The criterion, or the nearest one that works where multi-token prediction lacks statistics."""
    if site.kind != "mtp" or measured is None or not criterion.needs_statistics:
        return criterion
    if site.name not in measured.sites:
        notes.append(f"{site.name} was not calibrated; its channels are chosen by weight norms.")
        return CRITERIA["magnitude"]
    if criterion.needs_gradients:
        instead = "obs" if "gram" in criterion.needs else "l2"
        notes.append(f"{site.name} has no gradients; its channels are chosen by {instead}.")
        return CRITERIA[instead]
    return criterion


def site_channels(
    reader: CheckpointReader, site: MlpSite, criterion: Criterion, measured: Measured | None, seed: int
) -> Channels:
    """What the criterion needs of one site, read now.

    Behind pruned layers, down_proj is the one that makes up for them with all channels still there.

    Raises:
        UserError: statistics are missing.
    """
    fields: dict[str, Tensor] = {}
    if "norms" in criterion.needs:
        norms = channel_norms(reader, site)
        fields["down_l1_F"], fields["down_l2_F"] = torch.from_numpy(norms.l1), torch.from_numpy(norms.l2)
    if "down" in criterion.needs:
        fields["down_DF"] = read_down(reader, site)
        if measured is not None and measured.has(site.name, "shift"):
            fields["down_DF"] = refit_site(reader, site, torch.arange(site.width), measured).weight_DK
    wanted = {
        "sums": ("sum_squares", "sum_absolute", "sum"),
        "gram": ("gram",),
        "fisher": ("fisher",),
        "output_fisher": ("output_fisher",),
    }
    suffix = {"gram": "_FF", "output_fisher": "_DD"}
    num_tokens = 0
    for need, names in wanted.items():
        if need not in criterion.needs:
            continue
        for name in names:
            if measured is None or not measured.has(site.name, name):
                option = {
                    "gram": " with correlations: true",
                    "fisher": " with fisher: true",
                    "output_fisher": " with fisher: true",
                }.get(need, "")
                raise UserError(
                    f"The criterion {criterion.name} needs statistics of this model; "
                    f"run calibrate{option} first."
                )
            fields[name + suffix.get(need, "_F")] = torch.from_numpy(measured.read(site.name, name))
            num_tokens = measured.num_tokens(site.name)[0]
    return Channels(width=site.width, seed=seed, num_tokens=num_tokens, **fields)  # type: ignore[arg-type]


def refit_site(reader: CheckpointReader, site: MlpSite, kept_K: Tensor, measured: Measured) -> Refit:
    """down_proj of one site refitted to its kept channels."""

    def read(field: str) -> Tensor:
        return torch.from_numpy(measured.read(site.name, field))

    shift = None
    if measured.has(site.name, "shift"):
        shift = Shift(read("shift"), read("held_out_shift"), float(read("held_out_shift_power")[0]))
    return refit_down(
        read_down(reader, site),
        kept_K,
        gram_FF=read("gram"),
        num_tokens=measured.num_tokens(site.name)[0],
        held_out_gram_FF=read("held_out_gram"),
        stored_dtype=_STORED[reader.tensors[site.down.name].dtype],
        shift=shift,
    )


def read_down(reader: CheckpointReader, site: MlpSite) -> Tensor:
    """down_proj of a site [D, F], fp32."""
    return torch.from_numpy(reader.read_float32(site.down.name, expert=site.down.expert))


def _refits(
    reader: CheckpointReader,
    sites: list[MlpSite],
    plan: PruningPlan,
    measured: Statistics,
    layers: Mapping[str, dict[str, Any]],
    notes: list[str],
) -> dict[str, Callable[[], NDArray[Any]]]:
    """down_proj's name -> function that refits it; what it finds goes into `layers` and `notes`."""
    replacements: dict[str, Callable[[], NDArray[Any]]] = {}
    if stacked := [site.name for site in sites if site.down.expert is not None]:
        notes.append(f"{len(stacked)} stacked experts are not refitted; their columns are the parent's.")
    for site in sites:
        if site.down.expert is None and site.name in measured.sites:
            replacements[site.down.name] = lambda site=site: _refit_site(  # type: ignore[misc]
                reader, site, plan, measured, layers[site.name], notes
            )
    return replacements


def _refit_site(
    reader: CheckpointReader,
    site: MlpSite,
    plan: PruningPlan,
    measured: Statistics,
    row: dict[str, Any],
    notes: list[str],
) -> NDArray[np.float32]:
    result = refit_site(reader, site, torch.tensor(plan.kept[site.name]), measured)
    row |= {
        "error_before": result.error_before,
        "error_after": result.error_after,
        "rho": result.rho,
        "condition": result.condition,
        "tried": {f"{rho:g}": error for rho, error in result.tried.items()},
    }
    if result.rho is None:
        notes.append(f"{site.name}: the refit did not help on held-out tokens; its columns are the parent's.")
    rho = "none" if result.rho is None else f"{result.rho:g}"
    say(f"refit {site.name}: output error {result.error_before:.4f} -> {result.error_after:.4f} (rho {rho})")
    return result.weight_DK.numpy()

"""The calibration pass: what flows through the MLPs of the parent, counted over a corpus."""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from regrow.checkpoint import CheckpointReader
from regrow.data.batches import padding_efficiency, plan_batches
from regrow.data.blend import CorpusSpec, encode_corpora
from regrow.data.templates import Encoded
from regrow.errors import UserError
from regrow.families import mlp_sites
from regrow.files import sha256_json
from regrow.modeling.load import load_tokenizer, pick_device
from regrow.progress import say
from regrow.pruning.accumulate import Fields
from regrow.pruning.criteria import find_criterion
from regrow.pruning.passes import Job, run_in_memory
from regrow.pruning.select import check_width
from regrow.pruning.statistics import (
    SCHEMA,
    Layout,
    StatisticsWriter,
    merge_statistics,
    mode_behind,
    open_statistics,
    site_layout,
)
from regrow.types import MlpSite

Method = Literal["in_memory", "layerwise", "sequential"]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Share:
    """The rows of the corpus that are counted.

    Attributes:
        rows: calibration sequences.
        held_out: indices of those that only `held_out_gram` sees.
        notes: what a person should know of the choice.
    """

    rows: list[Encoded]
    held_out: frozenset[int]
    notes: list[str]


def calibrate(
    *,
    model: Path,
    corpora: Sequence[CorpusSpec],
    out: Path,
    num_tokens: int = 65_536,
    sequence_length: int = 1_024,
    batch_size: int = 8,
    correlations: bool = True,
    fisher: bool = False,
    method: Method = "in_memory",
    width: int | None = None,
    criterion: str = "obs",
    held_out_fraction: float = 0.125,
    seed: int = 0,
    enable_thinking: bool | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
    spill_bytes: int = 1 << 30,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Count the channels' statistics of a model over a blend of corpora into one file.

    Started by `torchrun`, every process takes its share of the batches and the first one merges.

    Args:
        model: folder of the parent checkpoint.
        corpora: (source, split, weight, limit) each; weights are shares of the tokens.
        out: the statistics file, see `regrow.pruning.statistics`.
        num_tokens: rows are taken until they hold so many tokens.
        sequence_length: rows are cut off there.
        batch_size: a batch holds at most batch_size * sequence_length tokens, pads included. The statistics
            do not depend on it.
        correlations: also count x x^T, which `obs` and the refit need.
        fisher: also count squared gradients, for `fisher` and `obs_fisher` (a backward pass per batch).
        method: `in_memory` holds the whole model; `layerwise` one decoder layer at a time; `sequential`, too,
            and it prunes each one before it runs the next, so that the refit makes up for earlier layers.
        width, criterion: of `sequential`, and of the `prune` that follows it.
        held_out_fraction: share of the sequences that rho is chosen on.
        dtype: dtype that the model runs in.
        spill_bytes: layerwise only: activations beyond this size go to disk beside `out`.

    Returns:
        The header of the file and `seconds, seconds_by_part, padding_efficiency, world_size, notes`.

    Raises:
        UserError: unusable corpus or model, a combination that does not exist.
        RunError: NaN or infinite activations; names the layer and the sequence.
    """
    start = time.monotonic()
    if method == "layerwise" and fisher:
        raise UserError("fisher needs gradients of the whole model; use method: in_memory or sequential.")
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use {', '.join(_DTYPES)}.")
    reader = CheckpointReader(model)
    sites = mlp_sites(reader.config, reader.tensors)
    sequential = method == "sequential"
    if sequential:
        fisher = fisher or find_criterion(criterion).needs_gradients
        _check_sequential(width, criterion, correlations, _widest(sites))
    tokenizer = load_tokenizer(model, trust_remote_code)
    corpus = encode_corpora(
        tokenizer, corpora, max_length=sequence_length, enable_thinking=enable_thinking, seed=seed
    )
    share = choose_rows(
        corpus.first_pass, num_tokens, held_out_fraction if correlations else 0.0, seed, _widest(sites)
    )
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    lengths = [len(row.input_ids) for row in share.rows]
    batches = plan_batches(lengths, batch_tokens=batch_size * sequence_length, seed=seed, epoch=0)
    job = Job(
        folder=Path(model),
        reader=reader,
        sites=sites,
        rows=share.rows,
        held_out=share.held_out,
        batches=batches[rank::world],
        correlations=correlations,
        fisher=fisher,
        seed=seed,
        dtype=_DTYPES[dtype],
        device=_local_device(device),
        trust_remote_code=trust_remote_code,
    )
    header = {
        "schema": SCHEMA,
        "parent": reader.fingerprint(),
        "model_type": reader.config.get("model_type"),
        "template": sha256_json([getattr(tokenizer, "chat_template", None), enable_thinking]),
        "mode": mode_behind(width, criterion) if sequential and width else "parent",
        "sequence_length": sequence_length,
        "correlations": correlations,
        "fisher": fisher,
        "method": method,
        "dtype": dtype,
        "seed": seed,
        "notes": [*corpus.notes, *share.notes],
    }
    for note in share.notes:
        say(f"calibrate: {note}")
    layout: Layout = {}
    for site in sites:
        layout |= site_layout(
            site.name,
            site.width,
            site.hidden_size,
            correlations=correlations,
            fisher=fisher,
            shift=sequential and site.module is not None,
        )
    target = out if world == 1 else out.with_name(f"{out.name}.part-{rank}")
    with open_statistics(target, layout) as writer:
        timings = _count(job, writer, method, out.parent, spill_bytes, width, criterion)
        mine = [row for batch in job.batches for row in batch]
        writer.header = header | {
            "num_tokens": sum(lengths[row] for row in mine if row not in share.held_out),
            "num_held_out_tokens": sum(lengths[row] for row in mine if row in share.held_out),
            "num_sequences": len(mine),
            "corpora": _named(corpus.sources(mine)),
        }
    final = _merge_ranks(out, rank, world) if world > 1 else writer.header
    return {
        **final,
        "statistics": str(out),
        "padding_efficiency": padding_efficiency(lengths, batches),
        "seconds": round(time.monotonic() - start, 3),
        "seconds_by_part": timings,
        "world_size": world,
    }


def _count(
    job: Job,
    writer: StatisticsWriter,
    method: Method,
    folder: Path,
    spill_bytes: int,
    width: int | None,
    criterion: str,
) -> dict[str, float]:
    """Run the pass; returns seconds by part."""
    if method == "in_memory":
        return run_in_memory(job, writer.write)
    from regrow.pruning.layerwise import run_layerwise

    if method == "layerwise" or width is None:
        return run_layerwise(job, writer.write, folder, spill_bytes)
    from regrow.pruning.sequential import Cut

    start = time.monotonic()
    gradients: Fields = {}
    if job.fisher:

        def collect(name: str, value: NDArray[Any]) -> None:
            site, _, field = name.rpartition(".")
            if field.endswith("fisher"):
                writer.write(name, value)
                gradients.setdefault(site, {})[field] = value

        say("calibrate: one backward pass of the parent comes first, for the gradients")
        run_in_memory(replace(job, correlations=False), collect)
    seconds = round(time.monotonic() - start, 3)
    cut = Cut(width, find_criterion(criterion), job.seed, gradients)
    return {"gradients": seconds} | run_layerwise(
        replace(job, fisher=False), writer.write, folder, spill_bytes, cut
    )


def _check_sequential(width: int | None, criterion: str, correlations: bool, model_width: int) -> None:
    if width is None:
        raise UserError("method: sequential prunes on the way; say to which width.")
    check_width(width, 1, model_width)
    if not correlations or not find_criterion(criterion).needs_statistics:
        raise UserError(
            "method: sequential needs correlations: true and a criterion that needs statistics; with "
            f"{criterion}, calibrate in_memory."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("method: sequential runs in one process; start it without torchrun.")


def choose_rows(
    rows: Sequence[Encoded], num_tokens: int, held_out_fraction: float, seed: int, width: int
) -> Share:
    """Rows until they hold `num_tokens`, and which of them are held out.

    Raises:
        UserError: a held-out share is asked for and there are fewer than two rows.
    """
    chosen: list[Encoded] = []
    total = 0
    for row in rows:
        if total >= num_tokens:
            break
        chosen.append(row)
        total += len(row.input_ids)
    notes = []
    if total < num_tokens:
        notes.append(f"the corpus holds {total:,} of the {num_tokens:,} tokens asked for; all are used.")
    if not held_out_fraction:
        return Share(chosen, frozenset(), notes)
    if len(chosen) < 2:
        raise UserError(
            "Calibration with correlations needs at least two sequences, one of them held out, and got "
            f"{len(chosen)}; use a longer corpus or more tokens ({4 * width:,} for {width:,} channels)."
        )
    count = min(max(round(held_out_fraction * len(chosen)), 1), len(chosen) - 1)
    held_out = frozenset(random.Random(f"{seed}-held-out").sample(range(len(chosen)), count))
    counted = sum(len(row.input_ids) for index, row in enumerate(chosen) if index not in held_out)
    if counted < 4 * width:
        why = (
            "fewer than channels, so the correlations have no full rank and only the ridge decides"
            if counted < width
            else "so few that the correlations are noisy"
        )
        notes.append(
            f"{counted:,} calibration tokens for {width:,} channels are {why}; "
            f"{4 * width:,} or more are needed, {8 * width:,} or more are better."
        )
    return Share(chosen, held_out, notes)


def _widest(sites: Sequence[MlpSite]) -> int:
    return max(site.width for site in sites)


def _named(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the header says of the corpora: local files by name only."""
    kept = ("split", "weight", "hash", "num_tokens")
    return [
        {
            "source": Path(source["source"]).name if os.path.exists(source["source"]) else source["source"],
            **{key: source[key] for key in kept},
        }
        for source in sources
    ]


def _local_device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def _merge_ranks(out: Path, rank: int, world: int) -> dict[str, Any]:
    """Wait for every process; the first one merges their files."""
    from torch import distributed

    own_group = not distributed.is_initialized()
    if own_group:
        distributed.init_process_group("gloo")
    try:
        distributed.barrier()
        parts = [out.with_name(f"{out.name}.part-{index}") for index in range(world)]
        if rank == 0:
            merge_statistics(parts, out)
            for part in parts:
                part.unlink()
        distributed.barrier()
    finally:
        if own_group:
            distributed.destroy_process_group()
    from regrow.pruning.statistics import Statistics

    return Statistics(out).header

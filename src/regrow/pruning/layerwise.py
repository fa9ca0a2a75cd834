"""Calibration with one decoder layer in memory at a time.

Resident are one layer's weights (and the next one's, read ahead by a thread), the statistics of that layer,
and the hidden states of all calibration sequences, [padded tokens, D], which go to disk where they are large.
Every layer sees the same batches in the same order as the pass that holds the whole model, so the statistics
are the same, bit for bit on the same device.
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from regrow.progress import Progress
from regrow.pruning.accumulate import Fields, hooked
from regrow.pruning.activations import Activations, open_activations
from regrow.pruning.passes import Job, Write, load_mtp_layers, run_mtp_layers
from regrow.pruning.sequential import Cut, run_layer_cut
from regrow.pruning.skeleton import Skeleton, empty, fill


@torch.no_grad()
def run_layerwise(
    job: Job, write: Write, folder: Path, spill_bytes: int, cut: Cut | None = None
) -> dict[str, float]:
    """Run the model layer by layer over the batches and write every site's statistics.

    Args:
        job: the pass.
        write: takes finished tensors of the statistics file.
        folder: where activations go if they are larger than `spill_bytes`.
        cut: how every layer is pruned before the next one is run (see `regrow.pruning.sequential`).

    Returns:
        Seconds by part.
    """
    skeleton = Skeleton(
        job.folder,
        job.reader,
        dtype=job.dtype,
        device=job.device,
        trust_remote_code=job.trust_remote_code,
    )
    clock = {"embed": 0.0, "layers": 0.0, "write": 0.0, "mtp": 0.0}
    batches = [(rows, *job.tensors(rows)) for rows in job.batches]
    hidden_size = job.sites[0].hidden_size
    shapes = [(*ids.shape, hidden_size) for _, ids, _ in batches]
    with ExitStack() as stack:

        def room() -> Activations:
            return stack.enter_context(open_activations(shapes, job.dtype, folder, spill_bytes))

        parent, student = room(), room() if cut is not None else None
        with _timed(clock, "embed"):
            embedding = skeleton.model.get_input_embeddings()
            fill(embedding, skeleton.read(embedding, _path_of(skeleton, embedding)), job.device)
            for index, (_, ids, mask) in enumerate(batches):
                hidden_BSD = skeleton.embed(ids, mask)
                parent.put(index, hidden_BSD)
                if student is not None:
                    student.put(index, hidden_BSD)
            empty(embedding)
        work = job.num_tokens * len(skeleton.layers)
        with Progress("calibrate layer by layer", work, "token layers") as progress, _reader_thread() as pool:
            ahead = pool.submit(_read_layer, skeleton, 0)
            for index in range(len(skeleton.layers)):
                weights = ahead.result()
                if index + 1 < len(skeleton.layers):
                    ahead = pool.submit(_read_layer, skeleton, index + 1)
                with _timed(clock, "layers"):
                    fill(skeleton.layers[index], weights, job.device)
                    if cut is not None and student is not None:
                        found = run_layer_cut(job, skeleton, index, parent, student, cut)
                    else:
                        found = _run_layer(job, skeleton, index, parent)
                    empty(skeleton.layers[index])
                with _timed(clock, "write"):
                    _write(found, write)
                progress.advance(job.num_tokens)
                del found, weights
        with _timed(clock, "mtp"):
            _write(_run_mtp(job, skeleton, student or parent), write)
    return {name: round(value, 3) for name, value in clock.items()}


def _write(found: Mapping[str, Mapping[str, NDArray[Any]]], write: Write) -> None:
    for site, fields in found.items():
        for field, value in fields.items():
            write(f"{site}.{field}", value)


def _run_layer(job: Job, skeleton: Skeleton, index: int, parent: Activations) -> Fields:
    """Run one layer over all batches; its output replaces its input in `parent`."""
    sums = job.sums([site for site in job.sites if site.module is not None and site.layer == index])
    with hooked(skeleton.model, sums) as hooks:
        for position, (_, _, mask_BS, batch) in enumerate(job.loaded()):
            hooks.batch = batch
            hidden_BSD = parent.get(position, job.device)
            parent.put(position, skeleton.run_layer(index, hidden_BSD, mask_BS))
    return {entry.site.name: entry.tensors() for entry in sums}


def _run_mtp(job: Job, skeleton: Skeleton, activations: Activations) -> Fields:
    sums = job.sums([site for site in job.sites if site.module is None])
    if not sums:
        return {}
    layers = load_mtp_layers(job, sums)
    embedding, norm = skeleton.model.get_input_embeddings(), skeleton.decoder.norm
    for module in (embedding, norm):
        fill(module, skeleton.read(module, _path_of(skeleton, module)), job.device)
    with hooked(skeleton.model, []) as hooks:
        for layer, entry in layers:
            hooks.add(layer.mlp(entry.site), entry)
        for position, (_, input_ids_BS, mask_BS, batch) in enumerate(job.loaded()):
            hidden_BSD = norm(activations.get(position, job.device))
            run_mtp_layers(job, layers, hooks, embedding, hidden_BSD, input_ids_BS, mask_BS, batch)
    return {entry.site.name: entry.tensors() for entry in sums}


def _read_layer(skeleton: Skeleton, index: int) -> dict[str, Tensor]:
    layer = skeleton.layers[index]
    weights = skeleton.read(layer, _path_of(skeleton, layer))
    if skeleton.device.type == "cuda":
        return {name: value.pin_memory() for name, value in weights.items()}
    return weights


def _path_of(skeleton: Skeleton, module: torch.nn.Module) -> str:
    return next(f"{name}." for name, found in skeleton.model.named_modules() if found is module)


@contextmanager
def _reader_thread() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _timed(clock: dict[str, float], part: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    clock[part] += time.monotonic() - start

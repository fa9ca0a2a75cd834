"""Calibration with one decoder layer in memory at a time.

Resident are one layer's weights (and the next one's, read ahead by a thread), the statistics of that layer,
and the hidden states of all calibration sequences, [padded tokens, D], which go to disk where they are large.
Every layer sees the same batches in the same order as the pass that holds the whole model, so the statistics
are the same, bit for bit on the same device.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regrow.errors import RunError
from regrow.files import disk_errors
from regrow.progress import Progress, say
from regrow.pruning.accumulate import SiteSums, hooked
from regrow.pruning.passes import Job, Write, load_mtp_layers, run_mtp_layers
from regrow.pruning.skeleton import Skeleton, empty, fill


class Activations:
    """Hidden states of every batch, in memory or in one file; a batch is read back as it was written."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, path: Path | None) -> None:
        self._shapes, self._dtype, self._path = shapes, dtype, path
        self._held: list[Tensor | None] = [None] * len(shapes)
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in shapes]
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes))]

    def put(self, index: int, hidden_BSD: Tensor) -> None:
        """Store a batch."""
        if hidden_BSD.dtype != self._dtype or tuple(hidden_BSD.shape) != self._shapes[index]:
            raise RunError(
                f"A layer gave hidden states of another shape or dtype ({hidden_BSD.dtype}); "
                "use method: in_memory."
            )
        if self._path is None:
            self._held[index] = hidden_BSD.cpu()
            return
        raw = hidden_BSD.cpu().contiguous().view(torch.uint8).numpy()
        with disk_errors(self._path), open(self._path, "r+b" if self._path.exists() else "w+b") as file:
            file.seek(self._offsets[index])
            raw.tofile(file)

    def get(self, index: int, device: torch.device) -> Tensor:
        """Read a batch back."""
        if self._path is None:
            held = self._held[index]
            assert held is not None
            return held.to(device, non_blocking=True)
        shape = self._shapes[index]
        count = int(np.prod(shape)) * self._dtype.itemsize
        raw = np.fromfile(self._path, dtype=np.uint8, count=count, offset=self._offsets[index])
        return torch.from_numpy(raw).view(self._dtype).reshape(shape).to(device)


@torch.no_grad()
def run_layerwise(job: Job, write: Write, folder: Path, spill_bytes: int) -> dict[str, float]:
    """Run the model layer by layer over the batches and write every site's statistics.

    Args:
        job: the pass.
        write: takes finished tensors of the statistics file.
        folder: where activations go if they are larger than `spill_bytes`.

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
    total = sum(int(np.prod(shape)) for shape in shapes) * job.dtype.itemsize
    with _spill_file(folder, total > spill_bytes) as path:
        if path is not None:
            say(f"calibrate: {total / 1e9:.1f} GB of activations go to disk beside the statistics")
        activations = Activations(shapes, job.dtype, path)
        with _timed(clock, "embed"):
            embedding = skeleton.model.get_input_embeddings()
            fill(embedding, skeleton.read(embedding, _path_of(skeleton, embedding)), job.device)
            for index, (_, ids, mask) in enumerate(batches):
                activations.put(index, skeleton.embed(ids, mask))
            empty(embedding)
        work = job.num_tokens * len(skeleton.layers)
        with Progress("calibrate layer by layer", work, "token layers") as progress, _reader_thread() as pool:
            ahead = pool.submit(_read_layer, skeleton, 0)
            for index in range(len(skeleton.layers)):
                weights = ahead.result()
                if index + 1 < len(skeleton.layers):
                    ahead = pool.submit(_read_layer, skeleton, index + 1)
                with _timed(clock, "layers"):
                    sums = _run_one(job, skeleton, index, weights, activations, progress)
                with _timed(clock, "write"):
                    for entry in sums:
                        for field, value in entry.tensors().items():
                            write(f"{entry.site.name}.{field}", value)
                del sums, weights
        with _timed(clock, "mtp"):
            _run_mtp(job, skeleton, activations, write)
    return {name: round(value, 3) for name, value in clock.items()}


def _run_one(
    job: Job,
    skeleton: Skeleton,
    index: int,
    weights: dict[str, Tensor],
    activations: Activations,
    progress: Progress,
) -> list[SiteSums]:
    """Run one layer over all batches; its output replaces its input in `activations`."""
    layer = skeleton.layers[index]
    fill(layer, weights, job.device)
    sums = job.sums([site for site in job.sites if site.module is not None and site.layer == index])
    with hooked(skeleton.model, sums) as hooks:
        for position, (_, _, mask_BS, batch) in enumerate(job.loaded()):
            hooks.batch = batch
            hidden_BSD = activations.get(position, job.device)
            activations.put(position, skeleton.run_layer(index, hidden_BSD, mask_BS))
            progress.advance(int(mask_BS.sum()))
    empty(layer)
    return sums


def _run_mtp(job: Job, skeleton: Skeleton, activations: Activations, write: Write) -> None:
    sums = job.sums([site for site in job.sites if site.module is None])
    if not sums:
        return
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
    for entry in sums:
        for field, value in entry.tensors().items():
            write(f"{entry.site.name}.{field}", value)


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
def _spill_file(folder: Path, needed: bool) -> Iterator[Path | None]:
    if not needed:
        yield None
        return
    with disk_errors(folder):
        descriptor, name = tempfile.mkstemp(prefix=".activations-", suffix=".partial", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _timed(clock: dict[str, float], part: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    clock[part] += time.monotonic() - start

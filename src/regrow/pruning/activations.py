"""Hidden states of a calibration set between two layers, in memory or on disk."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regrow.errors import RunError
from regrow.files import disk_errors
from regrow.progress import say


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


@contextmanager
def open_activations(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, folder: Path, spill_bytes: int
) -> Iterator[Activations]:
    """Room for a calibration set; beyond `spill_bytes` it is a file in `folder`, gone when the block ends."""
    total = sum(int(np.prod(shape)) for shape in shapes) * dtype.itemsize
    with _spill_file(folder, total > spill_bytes) as path:
        if path is not None:
            say(f"calibrate: {total / 1e9:.1f} GB of activations go to disk beside the statistics")
        yield Activations(list(shapes), dtype, path)


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

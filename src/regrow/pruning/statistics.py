"""Statistics of the channels as one safetensors file with a readable header.

The header's metadata entry `regrow` is JSON: what was counted, on which model, over which corpora. Tensors
are named `<site>.<field>`, sites as in `MlpSite.name`, F channels, D hidden size, x the input of down_proj
and h that of gate_proj:

  sum_squares, sum_absolute, sum        [F] float64   sums of x^2, |x|, x
  input_sum_squares, input_sum_absolute [D] float64   the same of h
  num_tokens                            [2] int64     tokens counted: calibration, held out
  gram, held_out_gram                   [F, F] float32  sum of x x^T (with correlations), symmetric
  fisher                                [F] float64   sum over sequences of squared gradients (if asked for)
  output_fisher                         [D, D] float32  sum over tokens of g g^T, g the gradient at the output
                                                        of down_proj (with fisher)
  shift, held_out_shift                 [D, F] float32  sum of d x^T, d what the residual stream lost so far
                                                        (method sequential)
  held_out_shift_power                  [1] float64     sum of ||d||^2 over held-out tokens

All but the `held_out` ones run over the calibration share. Files are written and read one tensor at a time:
at F = 9216 a gram is 340 MB, and 33 layers with both are 22 GB.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.errors import UserError
from regrow.files import disk_errors, sha256_json

SCHEMA = 1
_DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "I64": np.int64}
_METADATA_ROOM = 1 << 18
_LARGEST_HEADER = 100_000_000
Layout = dict[str, tuple[str, tuple[int, ...]]]


def mode_behind(width: int, criterion: str) -> str:
    """The `mode` of statistics gathered behind layers that were pruned like this; else it is `parent`."""
    return f"behind layers pruned to {width} by {criterion} with the refit"


def site_layout(
    name: str, width: int, hidden: int, *, correlations: bool, fisher: bool, shift: bool = False
) -> Layout:
    """Tensor name -> (dtype, shape) of one site."""
    fields: Layout = dict.fromkeys(("sum_squares", "sum_absolute", "sum"), ("F64", (width,)))
    fields |= dict.fromkeys(("input_sum_squares", "input_sum_absolute"), ("F64", (hidden,)))
    fields["num_tokens"] = ("I64", (2,))
    if fisher:
        fields["fisher"] = ("F64", (width,))
        fields["output_fisher"] = ("F32", (hidden, hidden))
    if correlations:
        fields |= dict.fromkeys(("gram", "held_out_gram"), ("F32", (width, width)))
    if shift:
        fields |= dict.fromkeys(("shift", "held_out_shift"), ("F32", (hidden, width)))
        fields["held_out_shift_power"] = ("F64", (1,))
    return {f"{name}.{field}": value for field, value in fields.items()}


class StatisticsWriter:
    """Fills the tensors of a statistics file in any order; made by `open_statistics`.

    Attributes:
        header: the JSON value of the metadata; complete it before the block ends.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.header: dict[str, Any] = {}
        self._path, self._layout = path, layout
        self._offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in layout.items():
            begin, end = end, end + math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
            self._offsets[name] = (begin, end)
        # The header is written last, since it holds the counts, so its room is reserved.
        self._room = -(-(len(self._json()) + _METADATA_ROOM) // 4096) * 4096 - 8
        self._written: set[str] = set()
        with open(path, "wb") as file:
            file.truncate(8 + self._room + end)

    def write(self, name: str, value: NDArray[Any]) -> None:
        """Write one tensor, in the dtype of the layout."""
        dtype, shape = self._layout[name]
        if value.shape != shape:
            raise ValueError(f"{name} has the shape {value.shape} instead of {shape}")
        with open(self._path, "r+b") as file:
            file.seek(8 + self._room + self._offsets[name][0])
            np.ascontiguousarray(value, dtype=_DTYPES[dtype]).tofile(file)
        self._written.add(name)

    def finish(self) -> None:
        """Write the header; every tensor must have been written."""
        if missing := sorted(self._layout.keys() - self._written):
            raise ValueError(f"{missing[0]} was never written")
        text = self._json()
        if len(text) > self._room:
            raise ValueError("the header of a statistics file outgrew its room")
        with open(self._path, "r+b") as file:
            file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))

    def _json(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"regrow": json.dumps(self.header)}}
        for name, (dtype, shape) in self._layout.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": self._offsets[name]}
        return json.dumps(header).encode()


@contextmanager
def open_statistics(out: str | Path, layout: Layout) -> Iterator[StatisticsWriter]:
    """A writer whose file appears under `out` when the block ends without an error."""
    out = Path(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            writer = StatisticsWriter(partial, layout)
            yield writer
            writer.finish()
            os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


class Statistics:
    """A statistics file, opened for reading; tensors are read when asked for.

    Attributes:
        path: the file.
        header: the metadata: schema, parent, model_type, corpora, num_tokens ...
        sites: site names in order.

    Raises:
        UserError: the file is missing, damaged, or no statistics file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= min(_LARGEST_HEADER, os.path.getsize(self.path)):
                    raise ValueError
                raw = json.loads(file.read(length))
            self.header: dict[str, Any] = json.loads(raw.pop("__metadata__")["regrow"])
            self._tensors = {
                name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in raw.items()
            }
            complete = max(8 + length + entry["data_offsets"][1] for entry in raw.values())
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist; run the calibrate stage first.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self.path} is no statistics file of regrow; run calibrate again.") from None
        if self.header.get("schema") != SCHEMA:
            raise UserError(f"{self.path} has another schema than this version reads; run calibrate again.")
        if complete > os.path.getsize(self.path):
            raise UserError(f"{self.path} is cut off; run calibrate again.")
        self.sites = list(dict.fromkeys(name.rpartition(".")[0] for name in self._tensors))

    @property
    def layout(self) -> Layout:
        """Tensor name -> (dtype, shape)."""
        names = {value: key for key, value in _DTYPES.items()}
        return {name: (names[dtype], shape) for name, (dtype, shape, _) in self._tensors.items()}

    def has(self, site: str, field: str) -> bool:
        """Whether that was counted."""
        return f"{site}.{field}" in self._tensors

    def read(self, site: str, field: str) -> NDArray[Any]:
        """One tensor, as a private array (no memory map, so that it is freed with its last user)."""
        dtype, shape, offset = self._tensors[f"{site}.{field}"]
        count = math.prod(shape)
        return np.fromfile(self.path, dtype=dtype, count=count, offset=offset).reshape(shape)

    def num_tokens(self, site: str) -> tuple[int, int]:
        """Tokens that reached the site: calibration, held out."""
        calibration, held_out = self.read(site, "num_tokens")
        return int(calibration), int(held_out)

    def hash(self) -> str:
        """Identifies what was counted, for the plan's record."""
        return sha256_json(self.header)


def merge_statistics(
    paths: Sequence[str | Path], out: str | Path, weights: Sequence[float] | None = None
) -> dict[str, Any]:
    """Add up the statistics of several corpora or processes.

    Args:
        paths: statistics files of the same model.
        out: the merged file.
        weights: share of each file in the blend. Without them every token counts the same; with them every
            file's sums are scaled so that the file has its share of the tokens (counts stay the true ones).

    Returns:
        The merged header.

    Raises:
        UserError: the files do not go together.
    """
    files = [Statistics(path) for path in paths]
    if not files:
        raise UserError("There are no statistics to merge; name two files or more.")
    first = files[0]
    for other in files[1:]:
        for key, what in _MUST_AGREE.items():
            if first.header.get(key) != other.header.get(key):
                raise UserError(f"{first.path} and {other.path} differ in {what}; merge files that agree.")
        if first.layout != other.layout:
            raise UserError(f"{first.path} and {other.path} count different things; calibrate both alike.")
    scales = _scales([file.header["num_tokens"] for file in files], weights)
    with open_statistics(out, first.layout) as writer:
        for name in first.layout:
            site, _, field = name.rpartition(".")
            if field == "num_tokens":
                writer.write(name, np.sum([file.read(site, field) for file in files], axis=0))
                continue
            total = files[0].read(site, field).astype(np.float64) * scales[0]
            for file, scale in zip(files[1:], scales[1:], strict=True):
                total += file.read(site, field).astype(np.float64) * scale
            writer.write(name, total)
        writer.header = _merged_header([file.header for file in files], weights)
    return writer.header


_MUST_AGREE = {
    "parent": "the model",
    "template": "the chat template or the thinking mode",
    "correlations": "whether correlations were counted",
    "mode": "what the layers before were (the parent's, or pruned ones)",
}


def _scales(num_tokens: list[int], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1.0] * len(num_tokens)
    if len(weights) != len(num_tokens) or min(weights) <= 0:
        raise UserError(f"{len(num_tokens)} statistics files need as many positive weights.")
    total = sum(num_tokens)
    return [weight / sum(weights) * total / count for weight, count in zip(weights, num_tokens, strict=True)]


def _merged_header(headers: list[Mapping[str, Any]], weights: Sequence[float] | None) -> dict[str, Any]:
    merged = dict(headers[0])
    for key in ("num_tokens", "num_held_out_tokens", "num_sequences"):
        merged[key] = sum(header[key] for header in headers)
    corpora: dict[str, dict[str, Any]] = {}
    for header in headers:
        for corpus in header["corpora"]:
            seen = corpora.setdefault(corpus["hash"], {**corpus, "num_tokens": 0})
            seen["num_tokens"] += corpus["num_tokens"]
    merged["corpora"] = list(corpora.values())
    merged["notes"] = list(dict.fromkeys(note for header in headers for note in header["notes"]))
    if weights is not None:
        merged["notes"].append(f"blended with the weights {', '.join(f'{w:g}' for w in weights)}")
    return merged

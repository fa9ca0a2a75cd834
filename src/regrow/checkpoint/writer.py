"""Write a checkpoint tensor by tensor: shards first, index and config last, into a folder that then appears.

Tensors that do not change are copied from file to file inside the kernel; nothing larger than a piece of
16 MiB is ever held here.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.checkpoint.dtypes import ITEM_BYTES
from regrow.checkpoint.reader import INDEX_NAME, CheckpointReader
from regrow.checkpoint.shards import shard_files
from regrow.errors import RunError, UserError
from regrow.files import disk_errors, publish_folder, require_new_folder
from regrow.progress import Progress

PIECE_BYTES = 16 << 20
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY)


@dataclass(frozen=True)
class FileSpan:
    """A run of bytes in a file, to be copied as it is."""

    path: Path
    begin: int
    nbytes: int


Piece = FileSpan | bytes | memoryview


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written: `pieces` gives its bytes in order, when it is its turn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Piece]]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def whole_tensor(reader: CheckpointReader, name: str) -> OutputTensor:
    """A parent's tensor, unchanged."""
    tensor = reader.tensors[name]
    span = FileSpan(reader.folder / tensor.file, tensor.begin, tensor.nbytes)
    return OutputTensor(name, tensor.dtype, tensor.shape, lambda: [span])


def write_checkpoint(
    *,
    out: str | Path,
    tensors: Sequence[OutputTensor],
    config: Mapping[str, Any],
    parent: CheckpointReader,
    shards: int | None = None,
    max_shard_size: int | str | None = None,
) -> dict[str, Any]:
    """Write a model folder that appears at `out` only when it is complete.

    Args:
        out: the folder; it must not exist, or be empty.
        tensors: what to write, in order. Each shard keeps that order within one element size, larger
            elements first, so that every tensor is aligned.
        config: the new config.json; its layout on the page follows the parent's.
        parent: where tokenizer, templates and the other files come from.
        shards: exactly so many files of balanced size.
        max_shard_size: or files of at most this size.

    Returns:
        `{"shards", "shard_bytes", "num_tensors", "weight_bytes", "other_files"}`.

    Raises:
        UserError: the output folder is taken, or the tensors cannot be spread as asked.
        RunError: the disk is full, or a file changed while it was read.
    """
    out = require_new_folder(out)
    if out.resolve() == parent.folder.resolve():
        raise UserError(f"{out} is the parent model itself; name another output folder.")
    by_name = {tensor.name: tensor for tensor in tensors}
    files = shard_files({t.name: t.nbytes for t in tensors}, shards=shards, max_shard_size=max_shard_size)
    total = sum(tensor.nbytes for tensor in tensors)
    shard_bytes: dict[str, int] = {}
    with publish_folder(out) as folder:
        _require_space(folder, total, out)
        with Progress(f"write {out.name}", total / 1e6, "MB") as progress:
            for file, names in files.items():
                chosen = sorted((by_name[n] for n in names), key=lambda t: -ITEM_BYTES[t.dtype])
                with disk_errors(out):
                    shard_bytes[file] = _write_shard(folder / file, chosen, progress)
        for name in parent.other_files:
            with disk_errors(out):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(parent.folder / name, folder / name)
        with disk_errors(out):
            if len(files) > 1:
                weight_map = {name: file for file, names in files.items() for name in names}
                order = {name: weight_map[name] for name in by_name}
                index = {"metadata": {"total_size": total}, "weight_map": order}
                _write_text(folder / INDEX_NAME, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
            _write_text(folder / "config.json", config_text(config, parent.folder / "config.json"))
    return {
        "shards": len(files),
        "shard_bytes": shard_bytes,
        "num_tensors": len(by_name),
        "weight_bytes": total,
        "other_files": list(parent.other_files),
    }


def config_text(config: Mapping[str, Any], like: Path) -> str:
    """A config as JSON text with the indentation and the last line's ending of another config file."""
    original = like.read_text(encoding="utf-8")
    second_line = original.split("\n", 2)[1] if "\n" in original.strip() else ""
    indent = len(second_line) - len(second_line.lstrip(" "))
    text = json.dumps(config, indent=indent or None, ensure_ascii=original.isascii())
    return text + ("\n" if original.endswith("\n") else "")


def _write_shard(path: Path, tensors: Sequence[OutputTensor], progress: Progress) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file.fileno(), len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                if isinstance(piece, FileSpan):
                    written += _copy_span(file.fileno(), piece, progress)
                else:
                    written += _write_all(file.fileno(), piece)
                    progress.advance(memoryview(piece).nbytes / 1e6)
            if written != tensor.nbytes:
                raise RunError(f"{tensor.name} came out with {written:,} bytes instead of {tensor.nbytes:,}.")
        return os.fstat(file.fileno()).st_size


def _copy_span(target: int, span: FileSpan, progress: Progress) -> int:
    kernel = True
    with open(span.path, "rb", buffering=0) as source:
        offset, end = span.begin, span.begin + span.nbytes
        while offset < end:
            want = min(end - offset, PIECE_BYTES)
            count = -1
            if kernel:
                try:
                    count = os.copy_file_range(source.fileno(), target, want, offset)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
                except AttributeError:  # not Linux
                    pass
                kernel = count >= 0
            if not kernel:
                piece = os.pread(source.fileno(), want, offset)
                count = _write_all(target, piece)
            if count == 0:
                raise RunError(f"The shard {span.path} shrank while it was being read.")
            offset += count
            progress.advance(count / 1e6)
    return span.nbytes


def _write_all(target: int, data: bytes | memoryview) -> int:
    rest = memoryview(data).cast("B")
    nbytes = rest.nbytes
    while rest:
        rest = rest[os.write(target, rest) :]
    return nbytes


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _require_space(folder: Path, nbytes: int, out: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise RunError(
            f"{out} needs {nbytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; free some space."
        )

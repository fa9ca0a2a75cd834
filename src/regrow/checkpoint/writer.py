"""Write a checkpoint tensor by tensor: shards first, index and config last, into a folder that then appears.

Tensors that do not change are copied from file to file inside the kernel; nothing larger than a piece of
4 MiB is ever held here.
"""

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from regrow.checkpoint.dtypes import ITEM_BYTES
from regrow.checkpoint.reader import INDEX_NAME, CheckpointReader
from regrow.checkpoint.shard_file import FileSpan, OutputTensor, write_shard
from regrow.checkpoint.shards import shard_files
from regrow.errors import RunError, UserError
from regrow.files import disk_errors, publish_folder, require_new_folder
from regrow.progress import Progress

# Two files at a time keep two cores busy, which copying inside the kernel needs where the disk is fast.
_WORKERS = 2


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
    with publish_folder(out) as folder:
        _require_space(folder, total, out)
        with disk_errors(out):
            shard_bytes = _write_shards(
                folder, {f: [by_name[n] for n in names] for f, names in files.items()}
            )
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


def _write_shards(folder: Path, files: Mapping[str, Sequence[OutputTensor]]) -> dict[str, int]:
    """Write all shards, two at a time unless a tensor is computed; file name -> size.

    The first failure stops the other file too, before it is raised.
    """
    lock, stop = threading.Lock(), threading.Event()
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    computed = any(tensor.computed for tensors in files.values() for tensor in tensors)
    workers = 1 if computed else min(_WORKERS, len(files))

    def write(file: str) -> int:
        if stop.is_set():
            raise _StoppedError
        try:
            return write_shard(folder / file, sorted(files[file], key=_larger_elements_first), wrote)
        except BaseException:
            stop.set()
            raise

    def wrote(nbytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            progress.advance(nbytes / 1e6)

    with (
        Progress(f"write {folder.name.strip('.').split('.partial-')[0]}", total / 1e6, "MB") as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        futures = {file: pool.submit(write, file) for file in files}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        except BaseException:  # interrupted while waiting
            stop.set()
            raise
        for future in done:
            if (error := future.exception()) is not None and not isinstance(error, _StoppedError):
                raise error
        return {file: future.result() for file, future in futures.items()}


class _StoppedError(Exception):
    """Another shard failed."""


def _larger_elements_first(tensor: OutputTensor) -> int:
    return -ITEM_BYTES[tensor.dtype]


def config_text(config: Mapping[str, Any], like: Path) -> str:
    """A config as JSON text with the indentation and the last line's ending of another config file."""
    original = like.read_text(encoding="utf-8")
    second_line = original.split("\n", 2)[1] if "\n" in original.strip() else ""
    indent = len(second_line) - len(second_line.lstrip(" "))
    text = json.dumps(config, indent=indent or None, ensure_ascii=original.isascii())
    return text + ("\n" if original.endswith("\n") else "")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _require_space(folder: Path, nbytes: int, out: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise RunError(
            f"{out} needs {nbytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; free some space."
        )

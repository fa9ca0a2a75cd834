"""A sharded safetensors checkpoint, read one tensor (or a few rows of one) at a time."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.checkpoint.dtypes import ITEM_BYTES, raw_dtype, to_float32
from regrow.checkpoint.header import read_header, read_json_object
from regrow.errors import RunError, UserError
from regrow.types import TensorInfo

INDEX_NAME = "model.safetensors.index.json"
# Weights in other forms, and what a training run leaves behind, do not belong to a released checkpoint.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".pkl",
    ".npz", ".index.json",
)  # fmt: skip
_NOT_CARRIED = ("config.json", "README.md", "manifest.json", "trainer_state.json", "report.json")
_SAMPLE_BYTES = 4096


def read_config_only(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder, which need not hold weights.

    Raises:
        UserError: the folder or the file is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name a folder that holds a model.")
    return read_json_object(folder / "config.json")


class CheckpointReader:
    """The tensors of a model folder, in the order of its index (or of its one file).

    Opening reads config, index and every shard's header, and checks them against each other and the files'
    sizes; no tensor data are read. Nothing is kept open, so a reader needs no closing.

    Raises:
        UserError: anything is missing, damaged or contradictory.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config_only(self.folder)
        self.tensors = _read_tensors(self.folder)

    @property
    def shard_names(self) -> list[str]:
        """File names of the shards, in the order of first use."""
        return list(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    @property
    def other_files(self) -> list[str]:
        """What travels with the weights: tokenizer, templates, generation and processor configs, licences.

        Paths relative to the folder. Weights in other formats, the parent's model card and hidden files stay
        behind (`left_behind` names them).
        """
        return [name for name in _all_files(self.folder) if not _stays_behind(name)]

    @property
    def left_behind(self) -> list[str]:
        """Files of the folder that belong neither to the checkpoint nor to `other_files`."""
        own = {"config.json", INDEX_NAME, *self.shard_names}
        return [name for name in _all_files(self.folder) if _stays_behind(name) and name not in own]

    def read_bytes(self, name: str, begin: int = 0, nbytes: int | None = None) -> bytes:
        """Bytes of a tensor's data from offset `begin`, to its end unless `nbytes` says otherwise."""
        tensor = self.tensors[name]
        nbytes = tensor.nbytes - begin if nbytes is None else nbytes
        buffer = bytearray(nbytes)
        self.read_into(name, memoryview(buffer), begin)
        return bytes(buffer)

    def read_into(self, name: str, buffer: memoryview, begin: int = 0) -> None:
        """Fill a writable byte buffer with a tensor's data from offset `begin` on."""
        tensor = self.tensors[name]
        if begin < 0 or begin + buffer.nbytes > tensor.nbytes:
            raise IndexError(f"bytes [{begin}, {begin + buffer.nbytes}) of {name}, which has {tensor.nbytes}")
        buffer, offset = buffer.cast("B"), tensor.begin + begin
        with open(self.folder / tensor.file, "rb", buffering=0) as file:
            while buffer:
                count = os.preadv(file.fileno(), [buffer], offset)
                if count <= 0:
                    raise RunError(f"The shard {self.folder / tensor.file} shrank while it was being read.")
                buffer, offset = buffer[count:], offset + count

    def read(self, name: str, *, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """Rows [begin, end) of axis 0 in the stored dtype, bit for bit; BF16 comes as uint16."""
        tensor = self.tensors[name]
        dtype = raw_dtype(tensor.dtype)
        if not tensor.shape:
            return np.frombuffer(self.read_bytes(name), dtype).reshape(())
        begin, end, _ = slice(begin, end).indices(tensor.shape[0])
        out: NDArray[Any] = np.empty((max(end - begin, 0), *tensor.shape[1:]), dtype)
        if out.size:
            row_bytes = tensor.nbytes // tensor.shape[0]
            self.read_into(name, out.data.cast("B"), begin * row_bytes)
        return out

    def read_float32(
        self, name: str, *, expert: int | None = None, begin: int = 0, end: int | None = None
    ) -> NDArray[np.float32]:
        """Values as float32: rows [begin, end) of axis 0.

        With `expert`, the tensor is a stack [E, ...]: that entry is picked first and the rows are its own.
        """
        tensor = self.tensors[name]
        if expert is None:
            return to_float32(self.read(name, begin=begin, end=end), tensor.dtype)
        _, rows, *rest = tensor.shape
        begin, end, _ = slice(begin, end).indices(rows)
        row_bytes = math.prod(rest) * ITEM_BYTES[tensor.dtype]
        raw = np.empty((max(end - begin, 0), *rest), raw_dtype(tensor.dtype))
        if raw.size:
            self.read_into(name, raw.data.cast("B"), (expert * rows + begin) * row_bytes)
        return to_float32(raw, tensor.dtype)

    def fingerprint(self) -> str:
        """Hex SHA-256 that tells checkpoints apart without reading them whole.

        Covers the config, every tensor's name, dtype and shape, and 4 KiB from the start, middle and end of
        each tensor. It does not depend on how the tensors are spread over files.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
            middle = max(0, (tensor.nbytes - _SAMPLE_BYTES) // 2)
            for begin in sorted({0, middle, max(0, tensor.nbytes - _SAMPLE_BYTES)}):
                digest.update(self.read_bytes(name, begin, min(_SAMPLE_BYTES, tensor.nbytes - begin)))
        return digest.hexdigest()


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        return {tensor.name: tensor for tensor in read_header(_only_shard(folder))}
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path} is damaged: it has no weight_map; fetch it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or not _is_plain_name(file):
            raise UserError(
                f"{index_path} puts {name!r:.80} into {file!r:.80}, which is no safetensors file of this "
                "folder; fetch the index again."
            )
    found: dict[str, TensorInfo] = {}
    for file in dict.fromkeys(weight_map.values()):
        for tensor in read_header(folder / file):
            if weight_map.get(tensor.name) != file:
                problem = "is in a second shard too" if tensor.name in weight_map else "is not in the index"
                raise UserError(f"{tensor.name!r} of the shard {folder / file} {problem}; fetch both again.")
            found[tensor.name] = tensor
    for name in weight_map:
        if name not in found:
            raise UserError(
                f"The shard {folder / weight_map[name]} lacks {name!r:.80}, which the index puts there; "
                "fetch both again."
            )
    return {name: found[name] for name in weight_map}


def _only_shard(folder: Path) -> Path:
    shards = sorted(folder.glob("*.safetensors"))
    standard = folder / "model.safetensors"
    if standard in shards:
        return standard
    if len(shards) == 1:
        return shards[0]
    if shards:
        raise UserError(
            f"{folder} holds {len(shards)} safetensors files and no {INDEX_NAME}; fetch the index."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UserError(f"{folder} holds only pickled weights, which regrow never loads; fetch safetensors.")
    raise UserError(f"{folder} holds no safetensors files; name a folder that holds a model.")


def _is_plain_name(file: str) -> bool:
    return (
        file == os.path.basename(file) and not file.startswith(".") and "\\" not in file and "\0" not in file
    )


def _all_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path.name
        elif path.is_dir() and path.name == "additional_chat_templates":
            yield from (f"{path.name}/{inner.name}" for inner in sorted(path.iterdir()) if inner.is_file())


def _stays_behind(name: str) -> bool:
    return name.startswith(".") or name in _NOT_CARRIED or name.endswith(_WEIGHT_SUFFIXES)

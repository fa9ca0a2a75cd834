"""The header of one safetensors file, validated completely before anything is read through it.

Format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, tensor data.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from regrow.checkpoint.dtypes import ITEM_BYTES
from regrow.errors import UserError
from regrow.types import TensorInfo

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_JSON_BYTES = 200_000_000


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        UserError: the file is missing, truncated, or its header is damaged in any way.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header is said to take {length:,} bytes of {size:,}")
            text = file.read(length)
    except FileNotFoundError:
        raise UserError(f"The shard {path} is missing; fetch it again.") from None
    except OSError as error:
        raise UserError(f"The shard {path} cannot be read ({error.strerror}); fetch it again.") from None
    if len(text) < length:
        raise _damaged(path, "it ends inside its header")
    entries = parse_json_object(text, str(path))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are no strings")
    tensors = [_tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.begin != position:
            raise _damaged(path, f"the data of {tensor.name!r} overlap another tensor's or leave a gap")
        position += tensor.nbytes
    if position != size:
        raise _damaged(path, f"it should have {position:,} bytes and has {size:,}")
    return tensors


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file such as config.json, as strictly as a header is read.

    Raises:
        UserError: missing, unreadable, not an object, or with a key given twice.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} is too large for what it should be; fetch it again.")
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a folder that holds a model.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch it again.") from None
    return parse_json_object(text, str(path))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; `where` names it in the message of the UserError."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKeyError as error:
        raise UserError(f"{where} is damaged: {error} is given twice; fetch it again.") from None
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["nested too deeply"])[0]
        raise UserError(f"{where} is damaged ({reason:.120}); fetch it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is damaged: it holds no JSON object; fetch it again.")
    return value


class _DuplicateKeyError(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(repr(next(k for k, _ in pairs if k in seen or seen.add(k))))  # type: ignore[func-returns-value]
    return value


def _tensor_info(path: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(path, f"{name!r} is not described")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _damaged(path, "a tensor's name is no text") from None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(path, f"{name!r} has the unknown dtype {dtype!r:.40}")
    if not _are_counts(shape) or len(shape) > 16:
        raise _damaged(path, f"{name!r} has no valid shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _damaged(path, f"{name!r} has no valid offsets")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * ITEM_BYTES[dtype] != nbytes:
        raise _damaged(path, f"the data of {name!r} do not have the size of its shape")
    return TensorInfo(name, dtype, tuple(shape), path.name, data_begin + offsets[0], nbytes)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"The shard {path} is damaged: {what}; fetch it again.")

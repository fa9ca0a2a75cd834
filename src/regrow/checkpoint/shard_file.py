"""One safetensors file, written tensor by tensor from pieces that are made when they are needed."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.checkpoint.dtypes import ITEM_BYTES
from regrow.errors import RunError

PIECE_BYTES = 4 << 20
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
    """One tensor to be written: `pieces` gives its bytes in order, when it is its turn.

    `computed` marks pieces that a caller's function makes; such functions are never called at the same time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Piece]]
    computed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_shard(path: Path, tensors: Sequence[OutputTensor], wrote: Callable[[int], None]) -> int:
    """Write one file; returns its size. `wrote` is told the bytes of every piece, and may raise to stop.

    Raises:
        RunError: a tensor came out with another size than it should have, or its source shrank.
    """
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
                    written += _copy_span(file.fileno(), piece, wrote)
                else:
                    count = _write_all(file.fileno(), piece)
                    written += count
                    wrote(count)
            if written != tensor.nbytes:
                raise RunError(f"{tensor.name} came out with {written:,} bytes instead of {tensor.nbytes:,}.")
        return os.fstat(file.fileno()).st_size


def _copy_span(target: int, span: FileSpan, wrote: Callable[[int], None]) -> int:
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
            wrote(count)
    return span.nbytes


def _write_all(target: int, data: bytes | memoryview) -> int:
    rest = memoryview(data).cast("B")
    nbytes = rest.nbytes
    while rest:
        rest = rest[os.write(target, rest) :]
    return nbytes

"""A store of the teacher's final hidden states on disk: resumable, memory-mapped, checked row by row.

With a frozen output layer the hidden state says everything that the logits do, at 2 D bytes per token instead
of 4 V (Qwen3.5-4B: 5 KB instead of 1 MB).

A store is a folder: `store.json` (what it belongs to, tokens per row), `states.bin` (bf16 [tokens, D], row
after row) and `rows.bin` (per row a CRC-32 and a mark that it is there; the mark is written last).
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.errors import RunError, UserError
from regrow.files import disk_errors, read_json, write_json

_THERE = 1
_ROW = np.dtype([("crc", "<u4"), ("there", "<u4")])


class StateStore:
    """Hidden states of numbered rows.

    Args:
        folder: where the store lies; made if it is not there.
        identity: what the states depend on (teacher's fingerprint, corpus hash, ...); JSON.
        num_tokens: tokens stored per row.
        width: D.

    Raises:
        UserError: the folder holds states of something else.
        RunError: the disk is full.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], num_tokens: Sequence[int], width: int) -> None:
        self.folder = folder
        self._offsets = np.concatenate([[0], np.cumsum(np.asarray(num_tokens, dtype=np.int64))])
        self._width = width
        header = {"schema": 1, "identity": identity, "num_tokens": list(map(int, num_tokens)), "width": width}
        with disk_errors(folder):
            self._open_files(header)
        self._states = np.memmap(
            folder / "states.bin", np.uint16, "r+", shape=(max(int(self._offsets[-1]), 1), width)
        )
        self._rows = np.memmap(folder / "rows.bin", _ROW, "r+", shape=(max(len(num_tokens), 1),))

    def _open_files(self, header: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "store.json"
        if path.exists():
            found = read_json(path)
            if found != header:
                raise UserError(
                    f"{self.folder} holds the states of another teacher or corpus; remove it or name another."
                )
            return
        state_bytes = max(int(self._offsets[-1]), 1) * self._width * 2
        for name, size in (("states.bin", state_bytes), ("rows.bin", max(len(self._offsets) - 1, 1) * 8)):
            with open(self.folder / name, "wb") as file:
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a bus error
                file.truncate(size)
        write_json(path, header)

    def __contains__(self, row: int) -> bool:
        return bool(self._rows["there"][row] == _THERE)

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows (each once) that are not stored yet."""
        return [row for row in dict.fromkeys(rows) if row not in self]

    def write(self, row: int, states_TD: Tensor) -> None:
        """Store a row's states, rounded to bf16."""
        values = states_TD.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
        begin, end = self._offsets[row], self._offsets[row + 1]
        if values.shape != (end - begin, self._width):
            raise ValueError(f"row {row} has {values.shape}, the store {(int(end - begin), self._width)}")
        self._states[begin:end] = values.view(np.uint16)
        self._rows[row] = (zlib.crc32(values.tobytes()), _THERE)

    def read(self, row: int) -> Tensor:
        """A row's states, bf16 [tokens, D].

        Raises:
            RunError: the row is not there, or its bytes have changed since they were written.
        """
        if row not in self:
            raise RunError(f"{self.folder} lacks row {row}; run again to complete it.")
        values = np.array(self._states[self._offsets[row] : self._offsets[row + 1]])
        if zlib.crc32(values.tobytes()) != self._rows["crc"][row]:
            raise RunError(f"Row {row} of {self.folder} is damaged; remove the folder and run again.")
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)

    def flush(self) -> None:
        """Make what was written durable: states first, then the marks."""
        self._states.flush()
        self._rows.flush()

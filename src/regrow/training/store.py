"""A store of what is known of the teacher per token, on disk: resumable, memory-mapped, checked row by row.

A store is a folder: `store.json` (what it belongs to, tokens per row), `records.bin` (a record per token, row
after row) and `rows.bin` (per row a CRC-32 and a mark that it is there; the mark is written last).
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regrow.errors import RunError, UserError
from regrow.files import disk_errors, read_json, write_json

_THERE = 1
_ROW = np.dtype([("crc", "<u4"), ("there", "<u4")])


def _reserve(path: Path, places: Sequence[tuple[int, int]]) -> None:
    """Claim bytes [begin, end): a full disk shows here, not as a bus error while the file is mapped."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        for begin, end in places:
            if end > begin:
                os.posix_fallocate(file.fileno(), begin, end - begin)


class TokenStore:
    """Records of the tokens of numbered rows.

    Args:
        folder: where the store lies; made if it is not there.
        identity: what the records depend on (teacher's fingerprint, corpus hash, ...); JSON.
        num_tokens: tokens stored per row.
        dtype: of a record, structured.

    Raises:
        UserError: the folder holds records of something else.
        RunError: the disk is full.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], num_tokens: Sequence[int], dtype: np.dtype
    ) -> None:
        self.folder, self._dtype = folder, dtype
        self._offsets = np.concatenate([[0], np.cumsum(np.asarray(num_tokens, dtype=np.int64))])
        header = {
            "schema": 2,
            "identity": identity,
            "num_tokens": list(map(int, num_tokens)),
            "record": str(dtype),
        }
        with disk_errors(folder):
            self._open_files(header)
        self._records = np.memmap(
            folder / "records.bin", dtype, "r+", shape=(max(int(self._offsets[-1]), 1),)
        )
        self._rows = np.memmap(folder / "rows.bin", _ROW, "r+", shape=(max(len(num_tokens), 1),))

    def _open_files(self, header: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "store.json"
        if path.exists():
            found = read_json(path)
            if found != header:
                raise UserError(
                    f"{self.folder} is of another teacher, corpus or teacher_mode; remove it or name another."
                )
            return
        record_bytes = max(int(self._offsets[-1]), 1) * self._dtype.itemsize
        row_bytes = max(len(self._offsets) - 1, 1) * _ROW.itemsize
        for name, size in (("records.bin", record_bytes), ("rows.bin", row_bytes)):
            with open(self.folder / name, "wb") as file:
                file.truncate(size)
        _reserve(self.folder / "rows.bin", [(0, row_bytes)])
        write_json(path, header)

    def reserve(self, rows: Sequence[int]) -> None:
        """Claim the disk space of these rows; the others take none.

        Raises:
            RunError: the disk is full.
        """
        size = self._dtype.itemsize
        places = [(int(self._offsets[row]) * size, int(self._offsets[row + 1]) * size) for row in rows]
        with disk_errors(self.folder):
            _reserve(self.folder / "records.bin", places)

    def __contains__(self, row: int) -> bool:
        return bool(self._rows["there"][row] == _THERE)

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows (each once) that are not stored yet."""
        return [row for row in dict.fromkeys(rows) if row not in self]

    def write(self, row: int, records_T: np.ndarray) -> None:
        """Store a row's records."""
        begin, end = self._offsets[row], self._offsets[row + 1]
        if records_T.shape != (end - begin,) or records_T.dtype != self._dtype:
            raise ValueError(
                f"row {row} has {records_T.shape} {records_T.dtype}, the store {end - begin} {self._dtype}"
            )
        self._records[begin:end] = records_T
        self._rows[row] = (zlib.crc32(records_T.tobytes()), _THERE)

    def read(self, row: int) -> np.ndarray:
        """A row's records [tokens].

        Raises:
            RunError: the row is not there, or its bytes have changed since they were written.
        """
        if row not in self:
            raise RunError(f"{self.folder} lacks row {row}; run again to complete it.")
        records_T = np.array(self._records[self._offsets[row] : self._offsets[row + 1]])
        if zlib.crc32(records_T.tobytes()) != self._rows["crc"][row]:
            raise RunError(f"Row {row} of {self.folder} is damaged; remove the folder and run again.")
        return records_T

    def flush(self) -> None:
        """Make what was written durable: records first, then the marks."""
        self._records.flush()
        self._rows.flush()

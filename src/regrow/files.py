"""Files and folders that are either finished or absent."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrow.errors import RunError, UserError

_CHUNK_BYTES = 1 << 22
_NO_PLACE = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


@contextlib.contextmanager
def alone_in(folder: Path, other: str) -> Iterator[None]:
    """Hold a folder for this process; the system releases the lock of a killed one.

    Args:
        folder: an existing folder; it gets a file `.lock`.
        other: the sentence for a second process: who is there, and what to do.

    Raises:
        UserError: `other`.
    """
    with disk_errors(folder):
        file = open(folder / ".lock", "w")  # noqa: SIM115 (closed below, whatever happens)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(other) from None
        yield


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: str | Path) -> Any:
    """The JSON value in a file.

    Raises:
        UserError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is not readable JSON ({_first_line(error)}); repair or fetch it again."
        ) from None


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON value so that a reader sees the old file or the whole new one.

    Raises:
        UserError: the folder does not exist or cannot be written to.
        RunError: the disk is full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written, its folder does not exist; make it or name another.")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with disk_errors(path):
        partial.write_text(
            json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        os.replace(partial, path)


def require_new_folder(out: str | Path) -> Path:
    """The path of an output folder that does not exist yet, or is empty.

    Raises:
        UserError: something lies there already.
    """
    out = Path(out)
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a broken link; remove it or name another output folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds something; name a new output folder or empty this one.")
    return out


@contextlib.contextmanager
def publish_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends without an error.

    A block that fails leaves nothing; a killed process leaves only a folder whose name starts with a dot
    and contains `.partial-`, which nothing takes for a result.
    """
    out = require_new_folder(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        partial.chmod(0o755)
        with disk_errors(out, only_full=True):  # other errors of the block are about its own inputs
            yield partial
        with disk_errors(out):
            if out.exists():
                out.rmdir()
            os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def disk_errors(target: str | Path, *, only_full: bool = False) -> Iterator[None]:
    """Turn a full disk, or (unless `only_full`) a refused write, into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"The disk is full while writing {target}; free some space and run again."
            ) from None
        if error.errno in _NO_PLACE and not only_full:
            raise UserError(f"{target} cannot be written ({error.strerror}); name another place.") from None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

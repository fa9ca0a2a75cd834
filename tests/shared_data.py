"""Where the tests find data that the project may use but not ship."""

import os
from pathlib import Path

import pytest


def shared(relative: str) -> Path:
    """The path of a shared data file; skips the test, with the reason, where it is absent."""
    root = Path(os.environ.get("REGROW_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / relative
    if not path.exists():
        pytest.skip(f"needs the test data {relative}, which is not shipped with the project")
    return path

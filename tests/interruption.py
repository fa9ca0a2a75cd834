"""Breaking off a training run at a chosen place, and comparing what comes of it."""

from pathlib import Path
from typing import Any

import pytest

from training_case import same_bytes, tensors_of


class Killed(BaseException):
    """Stands for a signal: nothing in between may catch it."""


def interrupted(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, at: int) -> None:
    """Break off the `at`-th call of a class' method, once."""
    real = getattr(owner, method)
    calls = iter(range(1, 1000))

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, wrapped)


def assert_same_run(left: dict[str, Any], right: dict[str, Any], folders: tuple[Path, Path]) -> None:
    """Two reports tell the same, and two models are equal bit for bit."""
    for curve in ("losses", "held_out", "chosen_step", "num_tokens", "num_response_tokens", "steps"):
        assert left[curve] == right[curve], curve
    one, other = map(tensors_of, folders)
    assert all(same_bytes(one[name], other[name]) for name in one)

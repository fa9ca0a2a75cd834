"""A measured figure and how sure it is."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """One figure with its 95 % interval.

    Attributes:
        value: the figure itself.
        low, high: ends of the interval, or None where none is known.
        num: how many items it was measured on, where recorded.
    """

    value: float
    low: float | None = None
    high: float | None = None
    num: int | None = None


def share(correct: int, total: int) -> Estimate:
    """A share of independent trials with Wilson's score interval (Wilson 1927, JASA 22:209)."""
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return Estimate(correct / total, float(interval.low), float(interval.high), total)


def interval_of(recorded: Any) -> tuple[float, float] | None:
    """The interval `[low, high]` in a recorded value, or None where it holds no such pair."""
    if not isinstance(recorded, list | tuple) or len(recorded) != 2:
        return None
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in recorded):
        return None
    low, high = (float(end) for end in recorded)
    return (low, high) if low <= high else None

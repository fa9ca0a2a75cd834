"""What a training run has done so far; saved with every checkpoint, so that a resumed run tells one story."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunRecord:
    """Counters and curves.

    Attributes:
        step: optimiser steps done.
        micro_batches: micro-batches of the plan that lie behind all processes.
        tokens, response_tokens, counted_tokens, padded_tokens: real tokens trained on, those the assistant
            wrote, those in the loss, and tokens computed with the pads.
        seconds: time spent in training steps, over all sessions.
        losses: `{step, loss, learning_rate, tokens, grad_norm}` per logging interval; loss is the mean.
        held_out: `{step, kl, top1_agreement, top5_agreement}` per evaluation, and `development` (share of
            instructions followed) where that selects.
        skipped: steps that were skipped, with the reason.
        recent: losses of the last steps, for the spike test.
        pending: sum and number of step losses since the last entry of `losses`.
        best_step, best_kl, best_development: the best evaluation.
    """

    step: int = 0
    micro_batches: int = 0
    tokens: int = 0
    response_tokens: int = 0
    counted_tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    losses: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    pending: list[float] = field(default_factory=lambda: [0.0, 0.0])
    best_step: int | None = None
    best_kl: float | None = None
    best_development: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    def add_step(self, loss: float) -> None:
        """Count a finished step."""
        self.pending[0] += loss
        self.pending[1] += 1
        self.recent = [*self.recent[1 - RECENT_STEPS :], loss]

    def close_interval(self, learning_rate: float, grad_norm: float | None) -> dict[str, Any] | None:
        """Append the mean loss since the last call to `losses` and return the entry."""
        if not self.pending[1]:
            return None
        entry = {
            "step": self.step,
            "loss": self.pending[0] / self.pending[1],
            "learning_rate": learning_rate,
            "tokens": self.tokens,
            "grad_norm": grad_norm,
        }
        self.losses.append(entry)
        self.pending = [0.0, 0.0]
        return entry

    def add_evaluation(self, step: int, figures: dict[str, float]) -> bool:
        """Append the figures of an evaluation; True where they are the best so far.

        More instructions of the development set come first, where they were counted; then the lower KL.
        """
        self.held_out.append({"step": step, **figures})
        kl, development = figures["kl"], figures.get("development")
        if not math.isfinite(kl):
            return False
        if self.best_kl is not None and (-(development or 0.0), kl) >= (
            -(self.best_development or 0.0),
            self.best_kl,
        ):
            return False
        self.best_step, self.best_kl, self.best_development = step, kl, development
        return True

    @property
    def since_best(self) -> int:
        """Evaluations after the best one."""
        return sum(entry["step"] > (self.best_step or 0) for entry in self.held_out)

    @property
    def padding_efficiency(self) -> float:
        """Real tokens over tokens computed."""
        return self.tokens / self.padded_tokens if self.padded_tokens else 1.0


RECENT_STEPS = 32
_MIN_HISTORY = 8
_SPIKE_RATIO = 4.0


def what_is_wrong(loss: float, grad_norm: float | None, recent: Sequence[float]) -> str | None:
    """Why a step must not be taken, or None.

    A spike is a loss above four times the median of the last 32 steps (once there are eight).

    Args:
        loss: the step's.
        grad_norm: norm of its gradient.
        recent: losses of the last steps; none where a loss is an estimate that may leap by itself.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if grad_norm is not None and not math.isfinite(grad_norm):
        return f"the gradient's norm is {grad_norm}"
    if len(recent) >= _MIN_HISTORY:
        median = sorted(recent)[len(recent) // 2]
        if loss > _SPIKE_RATIO * median and loss > median + 1e-3:
            return f"the loss leapt from {median:.4g} to {loss:.4g}"
    return None

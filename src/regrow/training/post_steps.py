"""Around the steps of `sft` and `dpo`: counting, the loss curve, held-out KL, the best weights."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from regrow.errors import RunError
from regrow.progress import Progress, say
from regrow.training.best import BestWeights
from regrow.training.held_out import HeldOut
from regrow.training.held_out import figures as held_out_figures
from regrow.training.post_settings import PostSettings
from regrow.training.record import RunRecord
from regrow.training.student import HiddenStates


@dataclass(frozen=True)
class PostData:
    """What is trained on.

    Attributes:
        columns: of the trainer's dataset.
        plan: the run's micro-batches as row numbers.
        tokens, loss_tokens: per row, tokens that are computed (pads left out) and those in the loss.
        padded: tokens that a micro-batch computes with its pads.
        report: more fields of the stage's report.
        notes: sentences.
    """

    columns: dict[str, list[list[int]]]
    plan: Sequence[tuple[int, ...]]
    tokens: Sequence[int]
    loss_tokens: Sequence[int]
    padded: Callable[[tuple[int, ...]], int]
    report: dict[str, Any]
    notes: list[str]


class PostSteps(TrainerCallback):
    """Counts steps, records losses, measures held-out KL and keeps the best adapters.

    Args:
        figures: entry of the loss curve -> the trainer's name of a figure that is recorded beside the loss.
        student: the model with adapters.
        data: what is trained on.
        held_out: what is measured between steps.
        device: where the model is.
        settings: the run's.
        record: what has been done so far; changed in place.
        best: keeps the best adapters.

    Attributes:
        student, data, record, best: as given.
        progress: shows finished steps, or None.
    """

    def __init__(
        self,
        figures: dict[str, str],
        student: HiddenStates,
        data: PostData,
        held_out: HeldOut,
        device: torch.device,
        settings: PostSettings,
        record: RunRecord,
        best: BestWeights,
    ) -> None:
        self.student, self.data, self.record, self.best = student, data, record, best
        self.progress: Progress | None = None
        self._figures, self._held_out = figures, held_out
        self._device, self._settings = device, settings
        self._start = 0.0
        student.keep_head(device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model before it is trained."""
        if not self.record.held_out:
            self._evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step; measure where it is due."""
        record, data, per_step = self.record, self.data, args.gradient_accumulation_steps
        for batch in data.plan[record.micro_batches : record.micro_batches + per_step]:
            record.tokens += sum(data.tokens[row] for row in batch)
            record.counted_tokens += sum(data.loss_tokens[row] for row in batch)
            record.padded_tokens += data.padded(batch)
        record.micro_batches += per_step
        record.step = state.global_step
        record.seconds += time.monotonic() - self._start
        if self.progress is not None:
            self.progress.advance(1)
        # A checkpoint does not hold what the Trainer sums between two entries: one is made before each.
        control.should_log |= control.should_save
        if record.step >= state.max_steps or record.step % self._settings.evaluation_interval == 0:
            self._evaluate()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the mean loss since the last entry.

        Raises:
            RunError: the loss or the gradient is not finite.
        """
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), logs.get("grad_norm")
        if not torch.isfinite(torch.tensor([loss, float(norm or 0)])).all():
            raise RunError(
                f"Training stopped at step {state.global_step}: the loss is {loss}, the gradient's norm "
                f"{norm}; lower learning_rate or raise warmup_fraction. The last checkpoint is kept."
            )
        entry = {
            "step": state.global_step,
            "loss": loss,
            "learning_rate": logs.get("learning_rate"),
            "tokens": self.record.tokens,
            "grad_norm": norm,
        }
        named = {own: logs[theirs] for own, theirs in self._figures.items() if theirs in logs}
        self.record.losses.append(entry | named)

    def _evaluate(self) -> None:
        was_training = self.student.training
        self.student.eval()
        found = held_out_figures(self._held_out.sums(self.student, self.student.head, self._device))
        self.student.train(was_training)
        step = self.record.step
        if self.record.add_evaluation(step, found) and self._settings.select_by == "held_out_kl" and step:
            self.best.save(step, self._state())
        say(f"step {step}: held-out KL {found['kl']:.4f}, top-1 agreement {found['top1_agreement']:.4f}")

    def _state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu() for name, parameter in self.student.trained().items()}

    def chosen(self) -> tuple[dict[str, Tensor], int, str]:
        """The adapters to merge, the step they are from, and a sentence that says why."""
        record = self.record
        if self._settings.select_by == "last":
            return self._state(), record.step, f"The weights are those of the last step, {record.step}."
        if record.best_step is None:
            raise RunError("No held-out evaluation gave a finite KL; look at the held-out text.")
        kl = f"held-out KL {record.best_kl:.4f}"
        if record.best_step == 0:
            return {}, 0, f"No step beat the weights before it ({kl}); they were kept, unchanged."
        return (
            self.best.load(record.best_step),
            record.best_step,
            f"The weights are those of step {record.best_step}, the best ({kl}).",
        )

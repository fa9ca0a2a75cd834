"""The ecosystem's trainer, taught to distil from hidden states."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from regrow.errors import RunError
from regrow.losses import LOSSES, SparseTargets, sparse_linear_kl
from regrow.progress import Progress, say
from regrow.training.best import BestWeights
from regrow.training.development import DevelopmentSet
from regrow.training.held_out import HeldOut, figures
from regrow.training.record import RunRecord, what_is_wrong
from regrow.training.resumable import ResumableTrainer
from regrow.training.rollouts import Rollouts
from regrow.training.rows import RunBatches, only_item
from regrow.training.settings import TrainingSettings
from regrow.training.student import HiddenStates, head_arguments
from regrow.training.teacher import Teacher

_SKIPS_IN_A_ROW = 5


class DistillTrainer(ResumableTrainer):
    """`transformers.Trainer` whose loss comes from final hidden states and what is known of the teacher.

    Hooks that differ from the Trainer's own:

    - `get_train_dataloader`: the planned micro-batches of this process, not shuffled, not prepared.
    - `get_batch_samples`: counts the tokens of a step over all micro-batches and processes, so that the loss
      of an accumulated step is the mean over the union of its tokens; lets the student write where asked.
    - `compute_loss`: teacher's targets, student's states, divergence.
    - `evaluate`: held-out KL and agreement, the development set; keeps the best weights, ends the wait.
    - `log`: the loss averaged over steps, across resumes.
    - `_clip_grad_norm`: remembers the norm, so that a step with a broken gradient is not taken.

    A callback of its own counts steps, refuses broken ones and shows progress.

    Args:
        student: the trained module.
        teacher: gives hidden states or sparse targets.
        batches: the run's micro-batches for this process.
        held_out: what is measured between steps.
        development: prompts that the student answers there as well, or None.
        settings: the run's settings.
        record: what has been done so far; changed in place.
        best: keeps the best weights.
        rollouts: text that the student writes, or None.
        progress: shows finished tokens, or None.
        args: the Trainer's arguments.
    """

    def __init__(
        self,
        *,
        student: HiddenStates,
        teacher: Teacher,
        batches: RunBatches,
        held_out: HeldOut,
        development: DevelopmentSet | None,
        settings: TrainingSettings,
        record: RunRecord,
        best: BestWeights,
        rollouts: Rollouts | None,
        progress: Progress | None,
        args: TrainingArguments,
    ) -> None:
        super().__init__(
            model=student,
            args=args,
            train_dataset=batches,
            eval_dataset=held_out,
            callbacks=[_StepCallback(self)],
        )
        self.remove_callback(PrinterCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(Path(str(args.output_dir)) / "logs")
        student.keep_head(self.args.device)
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.record, self.best = record, best
        self.progress = progress
        self._teacher, self._batches, self._held_out = teacher, batches, held_out
        self._settings, self._rollouts = settings, rollouts
        self._development = development
        self._divergence = LOSSES[settings.loss]
        self._grad_norm: float | None = None
        self._skips_in_a_row = 0
        self._reset_step()

    def _reset_step(self) -> None:
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._step_counts = [0, 0, 0, 0]
        self._grad_norm = None
        self._step_start = time.monotonic()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The planned micro-batches in their order."""
        return DataLoader(self._batches, batch_size=1, shuffle=False, collate_fn=only_item)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one step, and the tokens in the loss over all of them and all processes."""
        self._reset_step()
        if self._rollouts is not None:
            self._rollouts.prepare(self.state.global_step, self.student_model())
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [sample["batch"] for sample in samples]
        counts = torch.tensor(
            [
                sum(int(batch.positions.sum()) for batch in batches),
                sum(batch.num_tokens for batch in batches),
                sum(batch.response_tokens for batch in batches),
                sum(batch.input_ids.numel() for batch in batches),
            ],
            device=device,
        )
        self._step_counts = self.accelerator.reduce(counts, "sum").tolist()
        return samples, torch.tensor(max(self._step_counts[0], 1), device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's loss.

        Processes average their gradients, so each multiplies its share by their number.
        """
        batch = inputs["batch"].to(self.args.device)
        # The teacher goes first: its activations are gone before the student's are kept.
        targets = self._teacher.targets(batch)
        head = self.student_model().head
        hidden_TD = model(batch.input_ids)[batch.positions]
        settings = self._settings
        hidden_TD = hidden_TD.to(head.weight_VD.dtype)
        options = head_arguments(student=head, teacher=self._teacher.head) | {
            "temperature": settings.temperature,
            "labels_T": batch.labels if settings.label_weight else None,
            "label_weight": settings.label_weight,
            "normalizer": num_items_in_batch,
            "chunk_tokens": settings.loss_chunk_tokens,
        }
        if isinstance(targets, SparseTargets):
            output = sparse_linear_kl(hidden_TD, targets=targets, **options)
        else:
            output = self._divergence(hidden_TD, targets, beta=settings.beta, **options)
        loss = output.loss * self.accelerator.num_processes
        self._step_loss += loss.detach().double()
        return (loss, {}) if return_outputs else loss

    @property
    def num_held_out_tokens(self) -> int:
        """Positions of the held-out evaluation."""
        return self._held_out.num_tokens

    @property
    def has_waited_enough(self) -> bool:
        """Whether the evaluations since the best one use up the patience."""
        patience = self._settings.patience
        return patience is not None and self.record.since_best >= patience

    @property
    def num_trainable(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.student_model().trained().values())

    def student_model(self) -> HiddenStates:
        """The trained module without the wrappers of a distributed engine."""
        return self.accelerator.unwrap_model(self.model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out KL and agreement over all processes; remembers the weights where they are the best."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        sums = self._held_out.sums(model, self.student_model().head, self.args.device)
        model.train(was_training)
        found = figures(self.accelerator.reduce(sums, "sum"))
        if self._development is not None:
            counts = self._development.counts(self.student_model()).to(self.args.device)
            followed, total, finished, answers = self.accelerator.reduce(counts, "sum").tolist()
            found |= {"development": followed / total, "development_finished": finished / answers}
        step = self.state.global_step
        if self.record.add_evaluation(step, found) and self._settings.select_by != "last" and step:
            self.best.save(step, self.trained_state())
        if self.has_waited_enough:
            self.record.close_interval(self._get_learning_rate(), self._grad_norm)
            self.control.should_training_stop = True
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        if self.is_world_process_zero():
            text = (
                f"step {step}: held-out KL {found['kl']:.4f}, top-1 agreement {found['top1_agreement']:.4f}"
            )
            if "development" in found:
                text += f", development set {found['development']:.4f}"
            say(text)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean loss of the steps since the last entry, also where a resume lies between."""
        if "loss" in logs:
            entry = self.record.close_interval(logs["learning_rate"], logs.get("grad_norm"))
            if entry is not None:
                logs |= {"loss": entry["loss"], "tokens": entry["tokens"]}
                logs["padding_efficiency"] = self.record.padding_efficiency
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self._grad_norm = float(norm)
        return norm

    def check_step(self) -> None:
        """Refuse a step whose loss or gradient is broken.

        Raises:
            RunError: it is broken and the recipe says stop, or too many in a row were skipped.
        """
        # Every process holds the number of processes times its share: their mean is the step's loss.
        loss = float(self.accelerator.reduce(self._step_loss, "mean"))
        step = self.state.global_step + 1
        is_exact = self._settings.teacher_mode != "sampled"
        wrong = what_is_wrong(loss, self._grad_norm, self.record.recent if is_exact else ())
        if wrong is None:
            self._skips_in_a_row = 0
            self.record.add_step(loss)
            return
        advice = "lower learning_rate, raise warmup_fraction or look at the text of that step"
        if self._settings.on_spike == "stop":
            raise RunError(
                f"Training stopped at step {step}: {wrong}; {advice}, or set on_spike: skip. "
                "The last checkpoint is kept."
            )
        self._skips_in_a_row += 1
        if self._skips_in_a_row > _SKIPS_IN_A_ROW:
            raise RunError(
                f"Training stopped at step {step} after {self._skips_in_a_row} skipped steps in a row: "
                f"{wrong}; {advice}. The last checkpoint is kept."
            )
        say(f"step {step} is skipped: {wrong}.")
        self.record.skipped.append({"step": step, "reason": wrong})
        for parameter in self.student_model().parameters():
            parameter.grad = None

    def finish_step(self) -> None:
        """Count a step that was taken."""
        record = self.record
        record.step = self.state.global_step
        record.micro_batches += self.args.gradient_accumulation_steps * self.args.world_size
        record.counted_tokens += self._step_counts[0]
        record.tokens += self._step_counts[1]
        record.response_tokens += self._step_counts[2]
        record.padded_tokens += self._step_counts[3]
        record.seconds += time.monotonic() - self._step_start
        if self.progress is not None:
            loss = record.recent[-1] if record.recent else float("nan")
            self.progress.advance(self._step_counts[1], f"step {record.step}, loss {loss:.4f}")


class _StepCallback(TrainerCallback):
    """Calls the trainer back where the Trainer has no hook of its own."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and not self._trainer.record.held_out:
            self._trainer.evaluate()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.finish_step()
        control.should_log |= state.global_step >= state.max_steps

"""The Trainer's checkpoints, whichever its loss: trained weights and the run's record, whole or absent."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from regrow.errors import RunError
from regrow.files import disk_errors
from regrow.training.best import BestWeights
from regrow.training.checkpoints import publish_checkpoint, staging_folder
from regrow.training.record import RunRecord
from regrow.training.student import HiddenStates

_WEIGHTS = "model.safetensors"


class ResumableTrainer(Trainer):
    """Abstract: a Trainer that a killed run can go on with.

    To what the Trainer keeps (optimiser, scheduler, random states, steps done) a checkpoint adds the trained
    weights, in place of the whole model, and the record.

    Attributes:
        record: what has been done so far; whoever makes the trainer sets it.
        best: keeps the best weights; set likewise.
    """

    record: RunRecord
    best: BestWeights

    def student_model(self) -> HiddenStates:
        """The trained module without the wrappers of a distributed engine."""
        raise NotImplementedError

    def trained_state(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Trained parameters by their name in the causal language model, whole and on the CPU."""
        trained: dict[str, Tensor] = dict(self.student_model().trained())
        if state_dict is None and self.is_fsdp_enabled:
            state_dict = self.accelerator.get_state_dict(self.model)
        if state_dict is not None:
            whole = {name.removeprefix("model."): value for name, value in state_dict.items()}
            trained = {name: whole[name] for name in trained if name in whole}
        return {name: trained[name].detach().cpu().contiguous() for name in sorted(trained)}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        state = self.trained_state(state_dict)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_trained(self.student_model(), Path(resume_from_checkpoint) / _WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = Path(str(self.args.output_dir))
        self.args.output_dir = str(staging_folder(target))
        try:
            with _save_errors(target):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(target)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(target, self.state.global_step, self.record.as_json())
            self.best.forget_unused()
        self.accelerator.wait_for_everyone()


def load_trained(student: HiddenStates, file: Path) -> None:
    """Put saved trained parameters back.

    Raises:
        RunError: the file and the model disagree about what is trained.
    """
    state = load_file(file)
    parameters = student.trained()
    if differing := sorted(set(state) ^ set(parameters)):
        raise RunError(
            f"{file} does not fit what is trained ({differing[0]}); remove its folder to start again."
        )
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


@contextlib.contextmanager
def _save_errors(folder: Path) -> Iterator[None]:
    """A full disk as one sentence, whichever library meets it."""
    with disk_errors(folder):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            if "No space left" in str(error) or "failed writing" in str(error) or "os error 28" in str(error):
                raise RunError(
                    f"The disk is full while writing {folder}; free some space and run again."
                ) from None
            raise

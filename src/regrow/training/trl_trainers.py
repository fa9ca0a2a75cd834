"""TRL's trainers, fed with rows that are encoded already and batches that are planned. Imports TRL."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from regrow.training.post_steps import PostSteps
from regrow.training.resumable import ResumableTrainer
from regrow.training.student import HiddenStates

_PAD = 0  # whatever the tokenizer says: the masks keep it out of everything
REFERENCE = "ref"


class _Planned(ResumableTrainer):
    """What both trainers do differently from TRL's: planned batches, whole checkpoints, nothing is sent."""

    steps: PostSteps
    train_dataset: Any
    data_collator: Any

    def student_model(self) -> HiddenStates:
        """The model with adapters; a checkpoint holds these only."""
        return self.steps.student

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The planned micro-batches in their order."""
        plan: Any = self.steps.data.plan
        return DataLoader(self.train_dataset, batch_sampler=plan, collate_fn=self.data_collator)

    def _send_telemetry(self) -> None:
        """TRL would report the run to the Hub."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write one with every checkpoint."""


class PlannedSft(_Planned, SFTTrainer):
    """Columns `input_ids` and `labels` (-100 where a token does not count) per row."""


class PlannedDpo(_Planned, DPOTrainer):
    """Columns `prompt_ids`, `chosen_ids`, `rejected_ids` per pair."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows are tokens already."""
        return dataset


def sft_trainer(model: Any, tokenizer: Any, args: Any, steps: PostSteps) -> Any:
    """An SFTTrainer for a PEFT model; the loss is the mean over the labelled tokens of a whole step."""
    collate = DataCollatorForLanguageModeling(pad_token_id=_PAD)
    return _trainer(PlannedSft, collate, model, tokenizer, args, steps)


def dpo_trainer(model: Any, tokenizer: Any, args: Any, steps: PostSteps) -> Any:
    """A DPOTrainer for a PEFT model whose reference is the same model with its adapters off."""
    collate = DataCollatorForPreference(pad_token_id=_PAD)
    trainer = _trainer(PlannedDpo, collate, model, tokenizer, args, steps)
    # TRL keeps a copy of a PEFT model's adapters as the reference. Fresh adapters add nothing, so the model
    # without any is the same reference; TRL takes it where there is no such copy.
    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
    return trainer


def _trainer(kind: Any, collate: Any, model: Any, tokenizer: Any, args: Any, steps: PostSteps) -> Any:
    """A trainer that prints nothing and keeps TensorBoard's files in the run's work folder."""
    trainer = kind(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=Dataset.from_dict(steps.data.columns),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    trainer.steps, trainer.record, trainer.best = steps, steps.record, steps.best
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(str(trainer.args.output_dir)) / "logs")
    return trainer

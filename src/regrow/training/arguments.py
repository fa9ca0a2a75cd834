"""A run's settings in the words of `transformers.TrainingArguments` and the configs that extend it."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from regrow.errors import UserError
from regrow.modeling.load import pick_device
from regrow.training.settings import TrainingSettings


def training_arguments(settings: TrainingSettings, work_dir: Path) -> TrainingArguments:
    """Arguments for a run in `work_dir`.

    Precision is not among them: the student's own forward casts (see `HiddenStates`), so that the same code
    runs under every launcher.

    Raises:
        UserError: an optimiser or tracker is unknown or not installed.
    """
    return arguments_of(
        TrainingArguments,
        settings,
        work_dir,
        eval_strategy="steps",
        eval_steps=settings.evaluation_interval,
        bf16=False,
    )


def arguments_of(config: Any, settings: Any, work_dir: Path, **own: Any) -> Any:
    """What the arguments of every trainer have in common.

    Args:
        config: `transformers.TrainingArguments` or a class that extends it.
        settings: `TrainingSettings` or `PostSettings`.
        work_dir: the run's work folder.
        own: further arguments.

    Raises:
        UserError: an optimiser or tracker is unknown or not installed.
    """
    try:
        args = config(
            output_dir=str(work_dir),
            max_steps=settings.max_steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(settings.warmup_fraction * settings.max_steps),
            max_grad_norm=settings.max_grad_norm,
            optim=settings.optimizer,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            logging_strategy="steps",
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=settings.save_steps or settings.interval,
            report_to=list(settings.report_to) or ["none"],
            seed=settings.seed,
            use_cpu=pick_device(settings.device).type == "cpu",  # else bf16 is refused where there is no GPU
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            log_level="error",
            **own,
        )
    except (ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"The trainer refuses these settings: {reason[:200]}.") from None
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs take one process each (accelerate launch), not torch's DataParallel
    return args

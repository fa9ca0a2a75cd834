"""The run's settings in the words of `transformers.TrainingArguments`."""

import math
from pathlib import Path

from transformers import TrainingArguments

from regrow.errors import UserError
from regrow.training.settings import TrainingSettings


def training_arguments(settings: TrainingSettings, work_dir: Path) -> TrainingArguments:
    """Arguments for a run in `work_dir`.

    Precision is not among them: the student's own forward casts (see `HiddenStates`), so that the same code
    runs under every launcher.

    Raises:
        UserError: an optimiser or tracker is unknown or not installed.
    """
    try:
        args = TrainingArguments(
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
            eval_strategy="steps",
            eval_steps=settings.eval_steps or settings.interval,
            save_strategy="steps",
            save_steps=settings.save_steps or settings.interval,
            logging_strategy="steps",
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            report_to=list(settings.report_to) or ["none"],
            seed=settings.seed,
            use_cpu=settings.device == "cpu",
            bf16=False,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            log_level="error",
        )
    except (ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"The trainer refuses these settings: {reason[:200]}.") from None
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs take one process each (accelerate launch), not torch's DataParallel
    return args

"""What `sft` and `dpo` have in common in their settings, and how TRL's configs are told of them."""

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from regrow.errors import UserError
from regrow.training.arguments import arguments_of
from regrow.training.lora import DEFAULT_TARGETS

_TRL = "1.16"


@dataclass(frozen=True, kw_only=True)
class PostSettings:
    """Flat options of `sft` and `dpo`; the names are the recipe's.

    Attributes:
        max_steps: optimiser steps.
        learning_rate, weight_decay, warmup_fraction, max_grad_norm, optimizer: as in `TrainingSettings`:
            linear warm-up, then a cosine to zero.
        gradient_accumulation_steps: micro-batches per step.
        gradient_checkpointing: recompute activations in the backward pass.
        precision: `"bf16_mixed"` (fp32 adapters, bf16 products), `"bf16"`, `"fp32"`.
        eval_steps: steps between held-out evaluations; None is a tenth of `max_steps`.
        select_by: whose weights are given back: those with the lowest `"held_out_kl"`, the untrained ones
            included, or the `"last"`.
        held_out_tokens: the most tokens of the held-out evaluation.
        logging_steps, report_to: as in `transformers.TrainingArguments`.
        rank, alpha, dropout, targets, linear_attention: LoRA's; the update is scaled by alpha / rank.
        sequence_length: rows are cut off there.
        enable_thinking: passed to the chat template where given.
        seed: order of the data, adapters, sampling.
        device: `"auto"`, `"cpu"`, `"cuda"`.
        trust_remote_code: run Python code that the checkpoints bring along.
        shards, max_shard_size: files of the written model.
    """

    max_steps: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch_fused"
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    precision: Literal["bf16_mixed", "bf16", "fp32"] = "bf16_mixed"
    eval_steps: int | None = None
    select_by: Literal["held_out_kl", "last"] = "held_out_kl"
    held_out_tokens: int = 8_192
    logging_steps: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    linear_attention: bool = False
    sequence_length: int = 1_024
    enable_thinking: bool | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    shards: int | None = None
    max_shard_size: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("bf16_mixed", "bf16", "fp32"):
            raise UserError(f"precision is {self.precision!r}; use one of bf16_mixed, bf16, fp32.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}; it must be above 0.")
        if self.select_by not in ("held_out_kl", "last"):
            raise UserError(f"select_by is {self.select_by!r}; use held_out_kl or last.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must lie between 0 and 1, 1 left out.")

    @property
    def evaluation_interval(self) -> int:
        """Steps between held-out evaluations."""
        return self.eval_steps or max(1, self.max_steps // 10)


_POSITIVE = (
    "max_steps",
    "learning_rate",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "eval_steps",
    "held_out_tokens",
    "logging_steps",
    "rank",
    "alpha",
    "sequence_length",
)


def require_trl(stage: str) -> None:
    """Raises:
    UserError: TRL is not installed, or too old.
    """
    remedy = "run pip install 'regrow[post]'."
    try:
        importlib.import_module("trl")
        found = importlib.metadata.version("trl")
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise UserError(f"{stage} trains with TRL, which cannot be loaded ({error}); {remedy}") from None
    if Version(found) < Version(_TRL):
        raise UserError(f"{stage} needs TRL {_TRL} or newer and found {found}; {remedy}")


def trl_arguments(config: Any, settings: PostSettings, work_dir: Path, **own: Any) -> Any:
    """A TRL config for a run that logs into `work_dir` and saves nothing there.

    Args:
        config: `trl.SFTConfig` or `trl.DPOConfig`.
        settings: the run's.
        work_dir: its work folder.
        own: arguments that only this config has.

    Raises:
        UserError: an optimiser or tracker is unknown or not installed, or several processes were started.
    """
    args = arguments_of(
        config,
        settings,
        work_dir,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="no",
        save_strategy="no",
        bf16=settings.precision == "bf16_mixed",
        max_length=None,
        router_aux_loss_coef=0.0,  # the routers are frozen
        **own,
    )
    if args.world_size > 1:
        raise UserError("sft and dpo run in one process; start them without torchrun or accelerate launch.")
    return args

"""What `sft` and `dpo` have in common in their settings, and how TRL's configs are told of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regrow.errors import UserError
from regrow.training.arguments import arguments_of
from regrow.training.lora import DEFAULT_TARGETS
from regrow.training.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class PostSettings(RunSettings):
    """Flat options of `sft` and `dpo`; the names are the recipe's.

    Attributes:
        select_by: whose weights are given back: those with the lowest `"held_out_kl"`, the untrained ones
            included, or the `"last"`.
        held_out_tokens: the most tokens of the held-out evaluation.
        rank, alpha, dropout, targets, linear_attention: LoRA's; the update is scaled by alpha / rank.
    """

    select_by: Literal["held_out_kl", "last"] = "held_out_kl"
    held_out_tokens: int = 8_192
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    linear_attention: bool = False

    choices = RunSettings.choices | {"select_by": ("held_out_kl", "last")}
    positive = (*RunSettings.positive, "held_out_tokens", "rank", "alpha")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must lie between 0 and 1, 1 left out.")

    def identity(self) -> dict[str, Any]:
        """As `RunSettings.identity`."""
        return super().identity() | {"targets": list(self.targets)}


def trl_arguments(config: Any, settings: PostSettings, work_dir: Path, **own: Any) -> Any:
    """A TRL config for a run in `work_dir`.

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
        bf16=settings.precision == "bf16_mixed",
        max_length=None,
        router_aux_loss_coef=0.0,  # the routers are frozen
        **own,
    )
    if args.world_size > 1:
        raise UserError("sft and dpo run in one process; start them without torchrun or accelerate launch.")
    return args

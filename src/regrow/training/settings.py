"""Everything that a training run depends on besides its models and its text."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from regrow.errors import UserError
from regrow.recipe import Engine, contradiction
from regrow.types import Tokens

CorpusSpec = tuple[str, str, float, int | None]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every training run depends on, with whichever trainer; the names are the recipe's.

    Attributes:
        max_steps: optimiser steps.
        learning_rate, weight_decay, warmup_fraction, max_grad_norm, optimizer: AdamW by default; linear
            warm-up, then a cosine to zero. `optimizer` is a name that `transformers.TrainingArguments` knows.
        gradient_accumulation_steps: micro-batches per step and process.
        gradient_checkpointing: recompute activations in the backward pass.
        precision: `"bf16_mixed"` (fp32 trained weights, bf16 products), `"bf16"`, `"fp32"`.
        eval_steps: steps between held-out evaluations; None is a tenth of `max_steps`.
        save_steps: steps between checkpoints; None is a tenth of `max_steps`.
        logging_steps, report_to: as in `transformers.TrainingArguments`.
        sequence_length: rows are cut off there.
        enable_thinking: passed to the chat template where given.
        seed: order of the data, dropout, adapters, sampling.
        device: `"auto"`, `"cpu"`, `"cuda"`.
        trust_remote_code: run Python code that the checkpoints bring along.
        shards, max_shard_size: files of the written model.

    Raises:
        UserError: a value that cannot be.
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
    save_steps: int | None = None
    logging_steps: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    sequence_length: int = 1_024
    enable_thinking: bool | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    shards: int | None = None
    max_shard_size: str | None = None

    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "precision": ("bf16_mixed", "bf16", "fp32"),
        "device": ("auto", "cpu", "cuda"),
    }
    positive: ClassVar[tuple[str, ...]] = (
        "max_steps",
        "learning_rate",
        "max_grad_norm",
        "gradient_accumulation_steps",
        "eval_steps",
        "save_steps",
        "logging_steps",
        "sequence_length",
    )
    # What a run may change when it continues: where it runs, what it keeps and logs, how its result is cut.
    not_identity: ClassVar[tuple[str, ...]] = (
        "save_steps",
        "logging_steps",
        "report_to",
        "device",
        "trust_remote_code",
        "shards",
        "max_shard_size",
    )

    def __post_init__(self) -> None:
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}.")
        for name in self.positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}; it must be above 0.")

    @property
    def interval(self) -> int:
        """Steps between evaluations and checkpoints where the recipe does not say."""
        return max(1, self.max_steps // 10)

    @property
    def evaluation_interval(self) -> int:
        """Steps between held-out evaluations."""
        return self.eval_steps or self.interval

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights, as JSON: a resumed run must agree on them."""
        return {name: value for name, value in asdict(self).items() if name not in self.not_identity}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(RunSettings):
    """Flat options of `distill` and `recover`; the names are the recipe's.

    Attributes:
        loss, beta, temperature: the divergence (a key of `regrow.losses.LOSSES`), the teacher's weight in the
            mixtures, the divisor of the logits.
        label_weight: weight of the cross-entropy on the text itself, added to the divergence.
        tokens: `"all"` counts every predicted token, `"response"` those that the assistant writes.
        batch_tokens: the most tokens of a micro-batch, padding counted.
        teacher_mode: `"live"`, or from disk: `"cached"`, final hidden states; `"top_k"`, its most likely
            tokens; `"sampled"`, draws from it.
        teacher_entries: tokens or draws that `top_k` and `sampled` keep per predicted token.
        loss_chunk_tokens: tokens per chunk of the loss; None chooses.
        select_by: whose weights are given back, the untrained ones included: those with the lowest
            `"held_out_kl"`, those that follow most instructions of the `"development"` set, or the `"last"`.
        patience: evaluations without a better one after which the run stops early; None trains to the end.
        development_prompts, development_limit, development_tokens: the development set (as `ifeval.prompts`
            of a recipe; its first `development_limit`), and the longest answer.
        on_spike: what happens when the loss is not finite or leaps: `"stop"`, or `"skip"` the step.
        held_out_tokens: the most tokens of the held-out evaluation; None spends a tenth of the run's time,
            on 2,048 to 16,384 tokens.
        on_policy_fraction: share of the micro-batches that hold the student's own continuations.
        refresh_steps: steps after which the student writes new ones.
        rollout_tokens, rollout_temperature: length and sampling temperature of a continuation.
        rollout_batch_size: answers in flight, of rollouts and of the development set (vLLM takes its own).
        rollout_engine: who writes both, `"transformers"` (the student itself) or `"vllm"`.
    """

    loss: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    label_weight: float = 0.0
    tokens: Tokens = "all"
    learning_rate: float = 5e-5
    batch_tokens: int = 2_048
    teacher_mode: Literal["live", "cached", "top_k", "sampled"] = "live"
    teacher_entries: int = 64
    loss_chunk_tokens: int | None = None
    select_by: Literal["held_out_kl", "development", "last"] = "held_out_kl"
    patience: int | None = None
    development_prompts: str = "builtin:dev"
    development_limit: int | None = 128
    development_tokens: int = 512
    on_spike: Literal["stop", "skip"] = "stop"
    held_out_tokens: int | None = None
    on_policy_fraction: float = 0.0
    refresh_steps: int = 50
    rollout_tokens: int = 128
    rollout_temperature: float = 1.0
    rollout_batch_size: int = 32
    rollout_engine: Engine = "transformers"

    choices = RunSettings.choices | {
        "loss": ("forward_kl", "reverse_kl", "jsd", "skewed_kl"),
        "tokens": ("all", "response"),
        "teacher_mode": ("live", "cached", "top_k", "sampled"),
        "select_by": ("held_out_kl", "development", "last"),
        "on_spike": ("stop", "skip"),
    }
    positive = (
        *RunSettings.positive,
        "temperature",
        "batch_tokens",
        "teacher_entries",
        "loss_chunk_tokens",
        "patience",
        "development_limit",
        "development_tokens",
        "held_out_tokens",
        "refresh_steps",
        "rollout_tokens",
        "rollout_temperature",
        "rollout_batch_size",
    )
    not_identity = (
        *RunSettings.not_identity,
        "loss_chunk_tokens",
        "gradient_accumulation_steps",
        "rollout_batch_size",
        "on_spike",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if problem := contradiction(self):
            raise UserError(f"{problem}.")
        if not self.label_weight >= 0:
            raise UserError(f"label_weight is {self.label_weight}; it must not be below 0.")
        if not 0 <= self.on_policy_fraction <= 1:
            raise UserError(f"on_policy_fraction is {self.on_policy_fraction}; it must lie between 0 and 1.")

    def identity(self) -> dict[str, Any]:
        """As `RunSettings.identity`; `teacher_entries` only where the teacher's mode uses them."""
        values = super().identity()
        if self.teacher_mode not in ("top_k", "sampled"):
            del values["teacher_entries"]
        return values

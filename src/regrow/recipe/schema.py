"""The keys of a recipe. Unknown ones are refused: a typing error must not leave a default in force."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from regrow.types import Tokens

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Engine = Literal["transformers", "vllm"]


class Section(BaseModel):
    """A part of the recipe; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Corpus(Section):
    """One source of text and its share of the blend.

    `source` is a local json/jsonl/parquet file, a Hub dataset id, or `builtin:<name>` for text shipped with
    regrow. Rows are instruction/input/output (alpaca), messages, or plain text.
    """

    source: str
    split: str = "train"
    weight: Annotated[float, Field(gt=0)] = 1.0
    limit: Positive | None = None

    @property
    def spec(self) -> tuple[str, str, float, int | None]:
        """The flat form that leaf functions take."""
        return self.source, self.split, self.weight, self.limit


class Synthesize(Section):
    """A corpus that the parent writes before the run, with the options of `regrow synthesize`.

    `out` is a folder that gets `train.jsonl` and `held_out.jsonl`, which `corpora` and `held_out` name as any
    other text. A folder that is finished is used as it is, by every run that asks for the same.
    """

    out: str
    num_prompts: Positive = 1_500
    num_held_out: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    constraint_share: Fraction = 0.25
    system_share: Fraction = 0.25
    multi_turn_share: Fraction = 0.15
    style_share: Fraction = 0.5
    prompts: str | None = None
    num_self_prompts: Annotated[int, Field(ge=0)] = 0
    keep_out: tuple[str, ...] = ()
    attempts: Positive = 1
    violations: Literal["balance", "keep", "drop"] = "balance"
    max_new_tokens: Positive = 512
    batch_size: Positive = 32
    temperature: Annotated[float, Field(ge=0)] = 0.7
    engine: Engine = "transformers"


class Calibrate(Section):
    """How the statistics of the channels are gathered."""

    num_tokens: Positive = 65_536
    batch_size: Positive = 8
    correlations: bool = True
    method: Literal["in_memory", "layerwise", "sequential"] = "in_memory"
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.125


class Prune(Section):
    """Which channels go, and how the pruned checkpoint is written."""

    width: Positive
    step: Positive = 128
    criterion: str = "obs"
    refit: bool = True
    mtp: Literal["prune", "drop"] = "prune"
    shards: Positive | None = None
    max_shard_size: str | None = None

    @model_validator(mode="after")
    def _width_fits(self) -> "Prune":
        if self.width % self.step:
            raise ValueError(f"width {self.width} is no multiple of step {self.step}; change one of them")
        if self.shards is not None and self.max_shard_size is not None:
            raise ValueError("shards and max_shard_size exclude each other; keep one")
        return self


def contradiction(section: Any) -> str | None:
    """What two settings of a training section cannot both mean, as a sentence, or None.

    Args:
        section: a `Training` section or settings with the same names.
    """
    if section.patience is not None and section.select_by == "last":
        return "patience needs something to wait for; set select_by, or leave patience out"
    if section.teacher_mode != "live" and section.on_policy_fraction:
        return "on_policy_fraction needs a live teacher; set teacher_mode: live"
    if section.teacher_mode in ("top_k", "sampled") and section.loss != "forward_kl":
        return (
            f"teacher_mode {section.teacher_mode} knows too little of the teacher for loss {section.loss}; "
            "set loss: forward_kl or another teacher_mode"
        )
    writes = section.on_policy_fraction or section.select_by == "development"
    if section.rollout_engine == "vllm" and not writes:
        return (
            "rollout_engine: vllm has nothing to write; set on_policy_fraction or select_by: development, or "
            "leave it out"
        )
    return None


def sampling_contradiction(temperature: float, top_p: float, repeats: int) -> str | None:
    """What settings of sampled answers cannot mean, as a sentence, or None."""
    if not 0 <= temperature < math.inf:
        return f"temperature {temperature} is out of range; use 0 for greedy answers or a number above"
    if not 0 < top_p <= 1:
        return f"top_p {top_p} is out of range; use a share above 0, e.g. 0.95"
    if temperature == 0 and (repeats > 1 or top_p < 1):
        asked = f"repeats {repeats}" if repeats > 1 else f"top_p {top_p:g}"
        return f"{asked} needs sampled answers, and those at temperature 0 are greedy; set one, e.g. 0.7"
    return None


class Optimisation(Section):
    """What every training stage has in common."""

    max_steps: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_fraction: Fraction = 0.05
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False
    precision: Literal["bf16_mixed", "bf16", "fp32"] = "bf16_mixed"
    optimizer: str = "adamw_torch_fused"
    eval_steps: Positive | None = None
    save_steps: Positive | None = None
    logging_steps: Positive = 10
    report_to: tuple[str, ...] = ("tensorboard",)


class Lora(Section):
    """Which adapters are trained."""

    rank: Positive = 32
    alpha: Positive = 64
    targets: tuple[str, ...] = (
        "gate_proj",
        "up_proj",
        "down_proj",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    linear_attention: bool = False


class Training(Optimisation):
    """What the distilling stages have in common."""

    loss: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"] = "forward_kl"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0
    label_weight: Annotated[float, Field(ge=0)] = 0.0
    tokens: Tokens = "all"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    batch_tokens: Positive = 2_048
    gradient_accumulation_steps: Positive = 1
    teacher_mode: Literal["live", "cached", "top_k", "sampled"] = "live"
    teacher_entries: Positive = 64
    loss_chunk_tokens: Positive | None = None
    select_by: Literal["held_out_kl", "development", "last"] = "held_out_kl"
    patience: Positive | None = None
    development_prompts: str = "builtin:dev"
    development_limit: Positive | None = 128
    development_tokens: Positive = 512
    on_spike: Literal["stop", "skip"] = "stop"
    held_out_tokens: Positive | None = None
    on_policy_fraction: Fraction = 0.0
    refresh_steps: Positive = 50
    rollout_tokens: Positive = 128
    rollout_temperature: Annotated[float, Field(gt=0)] = 1.0
    rollout_batch_size: Positive = 32
    rollout_engine: Engine = "transformers"

    @model_validator(mode="after")
    def _settings_agree(self) -> "Training":
        if problem := contradiction(self):
            raise ValueError(problem)
        return self


class Distill(Training):
    """Distillation of the pruned model from its parent."""

    train: Literal["mlp", "all_but_embeddings"] = "all_but_embeddings"


class Recover(Training, Lora):
    """LoRA recovery with the same loss, merged into the weights."""

    dropout: Fraction = 0.0


class Finish(Distill):
    """Distillation on the student's own answers to the corpus' prompts (on-policy), after everything else.

    `loss: jsd` mixes forward and reverse KL; `beta` is the teacher's share.
    """

    loss: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"] = "jsd"
    on_policy_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    select_by: Literal["held_out_kl", "development", "last"] = "development"


class Post(Optimisation, Lora):
    """What fine-tuning and preference tuning with TRL have in common; adapters are merged afterwards."""

    held_out_tokens: Positive = 8_192


class Sft(Post):
    """Fine-tuning on the corpora's answers: cross-entropy on the assistant's tokens (TRL's SFTTrainer).

    `rows: followed` takes only answers that follow all of their constraints; `select_by` is then `last` by
    default, else `held_out_kl`.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch_tokens: Positive = 2_048
    gradient_accumulation_steps: Positive = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rows: Literal["all", "followed"] = "all"
    select_by: Literal["held_out_kl", "last"] | None = None


class Dpo(Post):
    """Preference tuning on pairs that the constraint checkers decide (TRL's DPOTrainer).

    `batch_size` counts pairs. The student writes `num_samples` answers of `rollout_tokens` to each prompt.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    beta: Annotated[float, Field(gt=0)] = 0.1
    batch_size: Positive = 4
    gradient_accumulation_steps: Positive = 4
    select_by: Literal["held_out_kl", "last"] = "last"
    num_samples: Positive = 4
    min_pairs: Positive = 32
    rollout_tokens: Positive = 512
    rollout_temperature: Annotated[float, Field(gt=0)] = 1.0
    rollout_batch_size: Positive = 32
    rollout_engine: Engine = "transformers"


class IfevalOptions(Section):
    """How IFEval (or a development set with the same checkers) is generated and scored.

    `prompts` is a local jsonl file, a Hub dataset id, or `builtin:dev` for the project's own development set.
    `temperature` 0 is greedy; above it each prompt can be answered `repeats` times for narrower intervals.
    """

    prompts: str = "google/IFEval"
    max_new_tokens: Positive = 1_280
    batch_size: Positive = 32
    limit: Positive | None = None
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repeats: Positive = 1
    engine: Engine = "transformers"

    @model_validator(mode="after")
    def _repeats_are_sampled(self) -> "IfevalOptions":
        problem = sampling_contradiction(self.temperature, self.top_p, self.repeats)
        if problem:
            raise ValueError(problem)
        return self


class LatencyOptions(Section):
    """Prompt and generation length for the speed measurement."""

    prompt_tokens: Positive = 256
    new_tokens: Positive = 64
    repeats: Positive = 3


class Evaluate(Section):
    """What is measured on the teacher and the student.

    `reuse` names run folders, or folders of records, in which results with equal settings are looked for
    before anything is measured (the teacher's IFEval, say).
    """

    benchmarks: tuple[Literal["fidelity", "ifeval", "latency"], ...] = ("fidelity", "ifeval", "latency")
    each_stage: bool = True
    batch_size: Positive = 8
    num_rows: Positive | None = None
    tokens: Tokens = "all"
    reuse: tuple[str, ...] = ()
    ifeval: IfevalOptions = IfevalOptions()
    latency: LatencyOptions = LatencyOptions()


class Report(Section):
    """What only a person can say about the published model.

    `country` (ISO 3166, three letters) lets codecarbon, where it is installed, turn energy into carbon.
    """

    model_id: str | None = None
    authors: str | None = None
    country: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] | None = None


class Recipe(Section):
    """One run, from parent checkpoint to model card."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    sequence_length: Positive = 1_024
    enable_thinking: bool | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    synthesize: tuple[Synthesize, ...] = ()
    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)]
    held_out: Corpus
    calibrate: Calibrate = Calibrate()
    prune: Prune
    distill: Distill | None = None
    recover: Recover | None = None
    finish: Finish | None = None
    sft: Sft | None = None
    dpo: Dpo | None = None
    evaluate: Evaluate = Evaluate()
    report: Report = Report()

    @model_validator(mode="after")
    def _written_text_is_read(self) -> "Recipe":
        corpora = [*self.corpora, self.held_out]
        sources = [os.path.normpath(corpus.source) for corpus in corpora]
        outs = [os.path.normpath(section.out) for section in self.synthesize]
        for section, out in zip(self.synthesize, outs, strict=True):
            if section.out.startswith("~") or out in ("", ".", "/"):
                raise ValueError(f"synthesize.out {section.out!r} names no folder of its own: give its path")
            if sum(Path(other).is_relative_to(out) for other in outs) > 1:
                raise ValueError(f"two entries of synthesize write into {out}: give each its own folder")
            files = {f"{out}/train.jsonl", f"{out}/held_out.jsonl"}
            read = {source for source in sources if Path(source).is_relative_to(out)}
            if not read:
                raise ValueError(
                    f"nothing reads {out}, which synthesize writes: name {out}/train.jsonl in corpora"
                )
            if read - files:
                raise ValueError(f"synthesize writes {' and '.join(sorted(files))}, not {min(read - files)}")
            if section.num_held_out == 0 and f"{out}/held_out.jsonl" in read:
                raise ValueError(f"{out}/held_out.jsonl is read and num_held_out is 0: raise it")
        return self

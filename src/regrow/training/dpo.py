"""Preference tuning: DPO on pairs of answers that the constraint checkers decide, LoRA, merged.

Source: Rafailov et al., arXiv 2305.18290: the loss of a pair is -log sigmoid(beta * margin), margin =
(log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)), with the model p and its reference q,
which here is the model without its adapters. At the first step p = q, so the loss is ln 2.
"""

import random
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from regrow import __version__
from regrow.checkpoint import CheckpointReader
from regrow.data.constrained import constrained_rows, hash_rows
from regrow.errors import UserError
from regrow.files import disk_errors, require_new_folder, sha256_json
from regrow.packages import require_engine, require_trl
from regrow.recipe import Engine
from regrow.training.pairs import PAIRS, Pair, load_or_make_pairs, require_pairs
from regrow.training.post import PostMethod, run_post
from regrow.training.post_settings import PostSettings, trl_arguments
from regrow.training.post_steps import PostData
from regrow.training.result import changed_tensors
from regrow.training.settings import CorpusSpec
from regrow.training.student import HiddenStates
from regrow.training.writing import find_answer

_FIGURES = {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}


def dpo(
    *,
    student: Path,
    teacher: Path,
    corpora: list[CorpusSpec],
    held_out: CorpusSpec,
    out: Path,
    work_dir: Path,
    pairs_dir: Path | None = None,
    beta: float = 0.1,
    batch_size: int = 4,
    learning_rate: float = 1e-5,
    gradient_accumulation_steps: int = 4,
    select_by: Literal["held_out_kl", "last"] = "last",
    num_samples: int = 4,
    min_pairs: int = 32,
    rollout_tokens: int = 512,
    rollout_temperature: float = 1.0,
    rollout_batch_size: int = 32,
    rollout_engine: Engine = "transformers",
    **options: Any,
) -> dict[str, Any]:
    """Tune a student with TRL's DPOTrainer toward answers that follow their constraints; merge and write it.

    Args:
        student, teacher, held_out, out: see `sft`.
        corpora: prompts are their rows with constraints (`data.constrained`).
        work_dir: as in `sft`, and a copy of the pairs, `pairs.jsonl`.
        pairs_dir: keeps pairs by what they depend on (student, prompts, sampling), for runs that differ in
            other settings too; None is `work_dir`.
        beta: how much a margin counts.
        batch_size: pairs of a micro-batch; every one is full, so all pairs of a step weigh the same.
        learning_rate, gradient_accumulation_steps, select_by: see `PostSettings`. Held-out KL is always
            measured, but by default the last step's weights are given back: preferences lead away from the
            teacher by intent.
        num_samples: answers by the student per prompt.
        min_pairs: with fewer pairs nothing is trained.
        rollout_tokens, rollout_temperature, rollout_batch_size: length in tokens and sampling temperature of
            these answers, and how many are in flight.
        rollout_engine: who writes them, `"transformers"` (the student itself) or `"vllm"`.
        options: other fields of `PostSettings`.

    Returns:
        as `sft`, with `pairs` (see `load_or_make_pairs`) and, beside each loss, `margin` (mean of
        beta * margin over the interval's pairs, nats) and `accuracy` (share of pairs with a positive one).

    Raises:
        UserError: TRL or vLLM is not installed, there are no prompts with constraints or too few pairs;
            arguments or models do not fit; `work_dir` belongs to another run.
        RunError: loss not finite, out of memory, disk full.
    """
    settings = PostSettings(
        learning_rate=learning_rate,
        gradient_accumulation_steps=gradient_accumulation_steps,
        select_by=select_by,
        **options,
    )
    sampling = {
        "num_samples": num_samples,
        "rollout_tokens": rollout_tokens,
        "rollout_temperature": rollout_temperature,
    }
    own = {
        "beta": beta,
        "batch_size": batch_size,
        "min_pairs": min_pairs,
        "rollout_batch_size": rollout_batch_size,
        **sampling,
    }
    for name, value in own.items():
        if not value > 0:
            raise UserError(f"{name} is {value}; it must be above 0.")
    require_trl("dpo")
    require_engine(rollout_engine)
    from trl.trainer.dpo_config import DPOConfig

    from regrow.training.trl_trainers import dpo_trainer

    require_new_folder(Path(out))
    rows = constrained_rows(corpora)
    if not rows:
        raise UserError(
            "The corpora hold no rows with verifiable constraints, which dpo needs; write some with "
            "regrow synthesize --constraint-share, or leave dpo out."
        )
    require_pairs(len(rows), len(rows), min_pairs)  # more pairs than prompts there cannot be
    reader = CheckpointReader(student)
    args = trl_arguments(DPOConfig, settings, Path(work_dir), beta=beta)
    sampled = {**sampling, "rollout_engine": rollout_engine, "prompts": hash_rows(rows)}
    pairs_depend_on = {
        **sampled,
        "precision": settings.precision,
        "sequence_length": settings.sequence_length,
        "enable_thinking": settings.enable_thinking,
        "seed": settings.seed,
        "student": reader.fingerprint(),
        "version": __version__,
    }
    pairs_folder = Path(pairs_dir or work_dir) / f"pairs-{sha256_json(pairs_depend_on)[:12]}"

    def data(model: PreTrainedModel, tokenizer: Any) -> PostData:
        answer = find_answer(
            rollout_engine,
            tokenizer=tokenizer,
            base=reader,
            replacements=changed_tensors,
            work_dir=Path(work_dir),
            precision=settings.precision,
            trust_remote_code=settings.trust_remote_code,
        )
        with torch.random.fork_rng():
            pairs, counts = load_or_make_pairs(
                pairs_folder,
                HiddenStates(model, autocast=settings.precision == "bf16_mixed"),
                tokenizer,
                rows,
                answer=answer,
                num_samples=num_samples,
                max_new_tokens=rollout_tokens,
                temperature=rollout_temperature,
                batch_size=rollout_batch_size,
                max_length=settings.sequence_length,
                enable_thinking=settings.enable_thinking,
                seed=settings.seed,
            )
        with disk_errors(work_dir):
            shutil.copy2(pairs_folder / PAIRS, work_dir)
        require_pairs(len(pairs), len(rows), min_pairs)
        return _data(pairs, counts, batch_size=batch_size, settings=settings)

    return run_post(
        PostMethod(
            name="dpo",
            options={"loss": "dpo", "tokens": "response", "rollout_engine": rollout_engine, **own},
            identity={"beta": beta, "batch_size": batch_size, **sampled},
            data=data,
            trainer=lambda model, tokenizer, steps: dpo_trainer(model, tokenizer, args, steps),
            figures=_FIGURES,
        ),
        student=Path(student),
        teacher=Path(teacher),
        held_out=held_out,
        out=Path(out),
        work_dir=Path(work_dir),
        settings=settings,
    )


def _data(pairs: list[Pair], counts: dict[str, Any], *, batch_size: int, settings: PostSettings) -> PostData:
    plan = plan_pairs(
        len(pairs),
        batch_size=batch_size,
        seed=settings.seed,
        num_batches=settings.max_steps * settings.gradient_accumulation_steps,
    )
    longest = [
        len(pair.prompt_ids) + max(len(pair.chosen.token_ids), len(pair.rejected.token_ids)) for pair in pairs
    ]
    answers = [len(pair.chosen.token_ids) + len(pair.rejected.token_ids) for pair in pairs]
    used = [row for batch in plan for row in batch]
    notes = []
    if counts["too_long"]:
        notes.append(
            f"dpo: {counts['too_long']} answers left out: with their prompts they exceed sequence_length."
        )
    return PostData(
        columns={
            "prompt_ids": [pair.prompt_ids for pair in pairs],
            "chosen_ids": [pair.chosen.token_ids for pair in pairs],
            "rejected_ids": [pair.rejected.token_ids for pair in pairs],
        },
        plan=plan,
        tokens=[2 * len(pair.prompt_ids) + num for pair, num in zip(pairs, answers, strict=True)],
        loss_tokens=answers,
        padded=lambda batch: 2 * len(batch) * max(longest[row] for row in batch),
        report={"pairs": counts, "num_response_tokens": sum(answers[row] for row in used)},
        notes=notes,
    )


def plan_pairs(num_pairs: int, *, batch_size: int, seed: int, num_batches: int) -> list[tuple[int, ...]]:
    """Full micro-batches over as many epochs as it takes; every epoch is shuffled anew by the seed."""
    order: list[int] = []
    epoch = 0
    while len(order) < num_batches * batch_size:
        shuffled = list(range(num_pairs))
        random.Random(f"{seed}-pairs-{epoch}").shuffle(shuffled)
        order += shuffled
        epoch += 1
    return [tuple(order[i * batch_size : (i + 1) * batch_size]) for i in range(num_batches)]

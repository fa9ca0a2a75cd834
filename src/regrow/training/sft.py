"""Fine-tuning on the corpora's answers: cross-entropy on the assistant's tokens, LoRA, merged.

With `rows="followed"` these are answers that programs have found to follow their constraints:
rejection-sampling fine-tuning (Yuan et al., arXiv 2308.01825) on the teacher's own text.
"""

from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from regrow.data.blend import EncodedCorpus, encode_corpora
from regrow.data.constrained import is_followed
from regrow.data.templates import Encoded
from regrow.errors import UserError
from regrow.files import require_new_folder
from regrow.modeling.load import load_tokenizer
from regrow.packages import require_trl
from regrow.training.post import PostMethod, run_post
from regrow.training.post_settings import PostSettings, trl_arguments
from regrow.training.post_steps import PostData
from regrow.training.rows import plan_run
from regrow.training.settings import CorpusSpec

IGNORED = -100


def sft(
    *,
    student: Path,
    teacher: Path,
    corpora: list[CorpusSpec],
    held_out: CorpusSpec,
    out: Path,
    work_dir: Path,
    batch_tokens: int = 2_048,
    learning_rate: float = 1e-4,
    rows: Literal["all", "followed"] = "all",
    select_by: Literal["held_out_kl", "last"] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tune a student with TRL's SFTTrainer on the answers in the corpora and write the merged model.

    The loss of a step is the mean cross-entropy, in nats, over all tokens that the assistant writes in the
    step's rows (in a plain text every token), each predicted from the tokens before it.

    Args:
        student: the model's folder.
        teacher: the parent's folder; only for the held-out KL.
        corpora: (source, split, weight, limit) each.
        held_out: likewise; measured between steps.
        out: the new model folder: `student` with the adapted matrices replaced, all else bit for bit.
        work_dir: checkpoints and the trainer's logs; a killed run that is called again goes on from there.
        batch_tokens: the most tokens of a micro-batch, padding counted; rows are padded on the right, never
            packed.
        learning_rate: peak.
        rows: which rows of the corpora are used: `"all"`, or those with constraints whose answer ended by
            itself and follows every one (`"followed"`, decided by IFEval's checkers).
        select_by: see `PostSettings`; by default `"held_out_kl"`, and `"last"` for followed rows, which lead
            away from the teacher by intent.
        options: other fields of `PostSettings`.

    Returns:
        as `distill`, where it applies.

    Raises:
        UserError: TRL is not installed; arguments, models or corpora do not fit, or `work_dir` belongs to
            another run.
        RunError: loss not finite, out of memory, disk full.
    """
    if rows not in ("all", "followed"):
        raise UserError(f"rows is {rows!r}; use all or followed.")
    select_by = select_by or ("last" if rows == "followed" else "held_out_kl")
    settings = PostSettings(learning_rate=learning_rate, select_by=select_by, **options)
    if batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens}; it must be above 0.")
    require_trl("sft")
    from trl.trainer.sft_config import SFTConfig

    from regrow.training.trl_trainers import sft_trainer

    require_new_folder(Path(out))
    corpus = encode_corpora(
        load_tokenizer(student, settings.trust_remote_code),
        corpora,
        max_length=settings.sequence_length,
        enable_thinking=settings.enable_thinking,
        seed=settings.seed,
        tokens="response",
        keep=is_followed if rows == "followed" else None,
    )
    args = trl_arguments(SFTConfig, settings, Path(work_dir), dataset_kwargs={"skip_prepare_dataset": True})

    def data(model: PreTrainedModel, tokenizer: Any) -> PostData:
        return _data(corpus, batch_tokens=batch_tokens, settings=settings)

    return run_post(
        PostMethod(
            name="sft",
            options={
                "batch_tokens": batch_tokens,
                "loss": "cross_entropy",
                "tokens": "response",
                "rows": rows,
            },
            identity={"batch_tokens": batch_tokens, "corpus": corpus.hash},
            data=data,
            trainer=lambda model, tokenizer, steps: sft_trainer(model, tokenizer, args, steps),
        ),
        student=Path(student),
        teacher=Path(teacher),
        held_out=held_out,
        out=Path(out),
        work_dir=Path(work_dir),
        settings=settings,
    )


def _data(corpus: EncodedCorpus, *, batch_tokens: int, settings: PostSettings) -> PostData:
    rows = corpus.rows
    plan = plan_run(
        corpus,
        batch_tokens=batch_tokens,
        seed=settings.seed,
        num_batches=settings.max_steps * settings.gradient_accumulation_steps,
    )
    used = [row for batch in plan for row in batch]
    return PostData(
        columns={"input_ids": [row.input_ids for row in rows], "labels": [labels_of(row) for row in rows]},
        plan=plan,
        tokens=[len(row.input_ids) for row in rows],
        loss_tokens=[sum(row.response_mask[1:]) for row in rows],
        padded=lambda batch: len(batch) * max(len(rows[row].input_ids) for row in batch),
        report={
            "corpora": corpus.sources(used),
            "num_response_tokens": sum(sum(rows[row].response_mask) for row in used),
        },
        notes=corpus.notes,
    )


def labels_of(row: Encoded) -> list[int]:
    """The row's tokens where the assistant writes them, -100 elsewhere and at the first token."""
    pairs = zip(row.input_ids[1:], row.response_mask[1:], strict=True)
    return [IGNORED, *(token if written else IGNORED for token, written in pairs)]

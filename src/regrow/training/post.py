"""One run of `sft` or `dpo`, from folders to a model folder: adapters, TRL's trainer, held-out KL, merge."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import overlay_checkpoint
from regrow.data.blend import encode_corpora
from regrow.errors import UserError
from regrow.files import require_new_folder
from regrow.modeling.hidden import check_head
from regrow.modeling.load import load_model, load_tokenizer, pick_device
from regrow.progress import Progress, say
from regrow.training.best import BestWeights
from regrow.training.checkpoints import claim_work_dir, newest_checkpoint, read_record
from regrow.training.held_out import HeldOut
from regrow.training.lora import add_adapters, merged_tensors
from regrow.training.memory import memory_errors, peak_memory_bytes
from regrow.training.post_settings import PostSettings
from regrow.training.post_steps import PostData, PostSteps
from regrow.training.record import RunRecord
from regrow.training.rows import plan_held_out
from regrow.training.settings import CorpusSpec
from regrow.training.student import HiddenStates, load_dtype, product_dtype, set_precision, stored_dtypes
from regrow.training.teacher import LiveTeacher, check_vocabularies


@dataclass(frozen=True)
class PostMethod:
    """What tells `sft` and `dpo` apart.

    Attributes:
        name: `"sft"` or `"dpo"`.
        options: the method's own settings, JSON.
        identity: what its trained weights depend on beside `PostSettings`, models and held-out text, JSON.
        data: the loaded student (still without adapters) and its tokenizer -> what is trained on.
        trainer: (model with adapters, tokenizer, callback) -> TRL's trainer.
        figures: entry of the loss curve -> TRL's name of the figure, for what is recorded beside the loss.
    """

    name: str
    options: dict[str, Any]
    identity: dict[str, Any]
    data: Callable[[PreTrainedModel, Any], PostData]
    trainer: Callable[[Any, Any, PostSteps], Any]
    figures: dict[str, str] = field(default_factory=dict)


def run_post(
    method: PostMethod,
    *,
    student: Path,
    teacher: Path,
    held_out: CorpusSpec,
    out: Path,
    work_dir: Path,
    settings: PostSettings,
) -> dict[str, Any]:
    """Train adapters on `student` and write the merged model to `out`.

    The teacher is loaded once, before the student, for its final hidden states of the held-out text; it does
    not stay in memory. A run that was killed goes on from its last checkpoint in `work_dir` when it is called
    again with the same arguments.

    Returns:
        the report: the fields of `distill`'s that apply, and the method's own.

    Raises:
        UserError: arguments, models or text do not fit, or `work_dir` belongs to another run.
        RunError: loss not finite, out of memory, disk full.
    """
    require_new_folder(out)
    device = pick_device(settings.device)
    reader, teacher_reader = CheckpointReader(student), CheckpointReader(teacher)
    check_vocabularies(reader, teacher_reader)
    tokenizer = load_tokenizer(student, settings.trust_remote_code)
    held = encode_corpora(
        tokenizer,
        [held_out],
        max_length=settings.sequence_length,
        enable_thinking=settings.enable_thinking,
        seed=settings.seed,
    )
    plan, num_held = plan_held_out(held.rows, batch_tokens=2_048, max_tokens=settings.held_out_tokens)
    identity = {
        "method": method.name,
        **method.identity,
        **settings.identity(),
        "student": reader.fingerprint(),
        "teacher": teacher_reader.fingerprint(),
        "held_out": held.hash,
    }
    claim_work_dir(work_dir, identity)
    checkpoint = newest_checkpoint(work_dir)
    record = RunRecord(**read_record(checkpoint)) if checkpoint else RunRecord()
    if checkpoint:
        say(f"{method.name}: continuing from step {record.step} of {settings.max_steps}.")
    with memory_errors(_remedies(settings), " The last checkpoint is kept."):
        live = LiveTeacher(
            load_model(
                teacher,
                dtype=product_dtype(settings.precision),
                device=device,
                trust_remote_code=settings.trust_remote_code,
            )
        )
        measured = HeldOut(held.rows[:num_held], plan, "all", live)
        measured.release_teacher(device)
        del live
        model = load_model(
            student,
            dtype=load_dtype(settings.precision),
            device=device,
            trust_remote_code=settings.trust_remote_code,
        )
        check_head(model)
        set_precision(model, [], stored_dtypes(reader), settings.precision)
        data = method.data(model, tokenizer)
        module, adapter_notes = add_adapters(
            model,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=settings.targets,
            linear_attention=settings.linear_attention,
            seed=settings.seed,
            fp32_adapters=settings.precision != "bf16",
        )
        wrapped = HiddenStates(module, autocast=settings.precision == "bf16_mixed")
        best = BestWeights(work_dir, writes=True)
        steps = PostSteps(method.figures, wrapped, data, measured, device, settings, record, best)
        try:
            trainer = method.trainer(module, tokenizer, steps)
        except (ValueError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"The trainer refuses these settings: {reason[:200]}.") from None
        with Progress(method.name, settings.max_steps - record.step, "steps") as steps.progress:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state, chosen_step, choice = steps.chosen()
    overlay_checkpoint(
        base=student,
        out=out,
        replacements=merged_tensors(reader, state, rank=settings.rank, alpha=settings.alpha),
        shards=settings.shards,
        max_shard_size=settings.max_shard_size,
    )
    return {
        "method": method.name,
        "steps": record.step,
        "num_tokens": record.tokens,
        "num_loss_tokens": record.counted_tokens,
        "tokens_per_s": record.tokens / record.seconds if record.seconds else None,
        "seconds": record.seconds,
        "losses": record.losses,
        "held_out": record.held_out,
        "held_out_tokens": measured.num_tokens,
        "chosen_step": chosen_step,
        "best_step": record.best_step,
        "padding_efficiency": record.padding_efficiency,
        "peak_memory_bytes": peak_memory_bytes(device),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "device": device.type,
        "held_out_corpus": held.sources(range(len(held.rows)))[0],
        "hyperparameters": {**asdict(settings), **method.options},
        **data.report,
        "notes": [*data.notes, *held.notes, *adapter_notes, choice],
    }


def _remedies(settings: PostSettings) -> list[str]:
    remedies = ["halve batch_tokens or batch_size and double gradient_accumulation_steps"]
    return remedies if settings.gradient_checkpointing else [*remedies, "set gradient_checkpointing: true"]

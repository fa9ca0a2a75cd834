"""One training run, from folders to a model folder; what distillation and recovery have in common."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import overlay_checkpoint
from regrow.data.blend import encode_corpora
from regrow.data.templates import Encoded
from regrow.errors import RunError, UserError
from regrow.files import require_new_folder
from regrow.modeling.hidden import check_head, head_of
from regrow.modeling.load import load_model, load_tokenizer, pick_device
from regrow.packages import require_engine
from regrow.progress import Progress, say
from regrow.training.arguments import training_arguments
from regrow.training.best import BestWeights
from regrow.training.checkpoints import claim_work_dir, newest_checkpoint, read_record
from regrow.training.development import DevelopmentSet
from regrow.training.held_out import HeldOut
from regrow.training.memory import memory_errors, peak_memory_bytes
from regrow.training.record import RunRecord
from regrow.training.rollouts import Rollouts, require_prompts
from regrow.training.rows import Plan, RunBatches, plan_held_out, plan_run
from regrow.training.settings import CorpusSpec, TrainingSettings
from regrow.training.student import HiddenStates, load_dtype, product_dtype, share_frozen
from regrow.training.teacher import LiveTeacher, Teacher, cached_teacher, check_vocabularies
from regrow.training.trainer import DistillTrainer
from regrow.training.writing import Replacements, find_answer


@dataclass(frozen=True)
class Method:
    """What tells distillation and recovery apart.

    Attributes:
        name: `"distill"` or `"recover"`.
        options: the method's own settings, JSON.
        prepare: freezes the loaded student, sets its precision, adds adapters; returns the module to train
            and sentences about it.
        replacements: trained state (name -> values) -> new values of the checkpoint's tensors.
    """

    name: str
    options: dict[str, Any]
    prepare: Callable[[PreTrainedModel, CheckpointReader], tuple[torch.nn.Module, list[str]]]
    replacements: Replacements


_MOST_FINISH = 0.5


def run_training(
    method: Method,
    *,
    student: Path,
    teacher: Path,
    corpora: list[CorpusSpec],
    held_out: CorpusSpec,
    out: Path,
    work_dir: Path,
    settings: TrainingSettings,
) -> dict[str, Any]:
    """Train `student` toward `teacher` and write the result to `out`.

    A run that was killed goes on from its last checkpoint in `work_dir` when it is called again with the same
    arguments. Under `accelerate launch` or `torchrun` every process calls this; the first one writes.

    Returns:
        the report: counts, curves, speed, memory, hyperparameters, notes.

    Raises:
        UserError: arguments, models or corpora do not fit, or `work_dir` belongs to another run.
        RunError: loss not finite, out of memory, disk full.
    """
    require_new_folder(out)
    pick_device(settings.device)
    require_engine(settings.rollout_engine)
    readers = CheckpointReader(student), CheckpointReader(teacher)
    check_vocabularies(*readers)
    args = training_arguments(settings, work_dir)
    tokenizer = load_tokenizer(student, settings.trust_remote_code)
    corpus, held = (
        encode_corpora(
            tokenizer,
            specs,
            max_length=settings.sequence_length,
            enable_thinking=settings.enable_thinking,
            seed=settings.seed,
            tokens=settings.tokens,
        )
        for specs in (corpora, [held_out])
    )
    rows, notes = corpus.rows, [*corpus.notes, *held.notes]

    if settings.on_policy_fraction:
        require_prompts(rows)
    if uses_fsdp() and (settings.on_policy_fraction or settings.select_by == "development"):
        raise UserError(
            "Under FSDP no process holds the whole student, so it cannot write text; set "
            "on_policy_fraction: 0 and select_by: held_out_kl, or use DDP."
        )
    answer = find_answer(
        settings.rollout_engine,
        tokenizer=tokenizer,
        base=readers[0],
        replacements=method.replacements,
        work_dir=work_dir,
        precision=settings.precision,
        trust_remote_code=settings.trust_remote_code,
        world_size=args.world_size,
    )
    development = None
    if settings.select_by == "development":
        development = DevelopmentSet(
            settings.development_prompts,
            tokenizer,
            readers[0].config,
            answer=answer,
            limit=settings.development_limit,
            max_new_tokens=settings.development_tokens,
            batch_size=settings.rollout_batch_size,
            enable_thinking=settings.enable_thinking,
            rank=args.process_index,
            world_size=args.world_size,
        )
    if settings.on_policy_fraction or development:
        notes.append(f"The student's own texts were written by the engine {settings.rollout_engine}.")

    identity = {
        "method": method.name,
        **method.options,
        **settings.identity(),
        "student": readers[0].fingerprint(),
        "teacher": readers[1].fingerprint(),
        "corpus": corpus.hash,
        "held_out": held.hash,
        **({"development": development.hash} if development else {}),
    }
    with args.main_process_first(local=False):
        claim_work_dir(work_dir, identity)
    checkpoint = newest_checkpoint(work_dir)
    record = RunRecord(**read_record(checkpoint)) if checkpoint else RunRecord()
    if checkpoint and args.process_index == 0:
        say(f"{method.name}: continuing from step {record.step} of {settings.max_steps}.")

    per_step = args.gradient_accumulation_steps * args.world_size
    plan = plan_run(
        corpus,
        batch_tokens=settings.batch_tokens,
        seed=settings.seed,
        num_batches=record.micro_batches + (settings.max_steps - record.step) * per_step,
    )
    held_plan, num_held = plan_held_out(
        held.rows, batch_tokens=settings.batch_tokens, max_tokens=_held_out_tokens(rows, plan, settings)
    )
    held_rows = held.rows[:num_held]

    with memory_errors(_remedies(settings), " The last checkpoint is kept."):
        model = load_model(
            student,
            dtype=load_dtype(settings.precision),
            device=args.device,
            trust_remote_code=settings.trust_remote_code,
        )
        _check_student(model, student)
        module, method_notes = method.prepare(model, readers[0])
        notes += method_notes
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        teachers = _teachers(
            model, readers, (rows, held_rows), (plan, held_plan), (corpus.hash, held.hash),
            args, settings, work_dir, notes,
        )  # fmt: skip
        wrapped = HiddenStates(module, autocast=settings.precision == "bf16_mixed")
        rollouts = None
        if settings.on_policy_fraction:
            rollouts = Rollouts(
                work_dir=work_dir,
                rows=rows,
                plan=plan,
                tokenizer=tokenizer,
                answer=answer,
                fraction=settings.on_policy_fraction,
                refresh_steps=settings.refresh_steps,
                first=(record.step, record.micro_batches),
                batches_per_step=per_step,
                batch_tokens=settings.batch_tokens,
                max_new_tokens=settings.rollout_tokens,
                temperature=settings.rollout_temperature,
                batch_size=settings.rollout_batch_size,
                seed=settings.seed,
                rank=args.process_index,
                world_size=args.world_size,
            )
        batches = RunBatches(
            rows,
            plan,
            settings.tokens,
            rank=args.process_index,
            world_size=args.world_size,
            start=record.step * args.gradient_accumulation_steps,
            consumed=record.micro_batches,
        )
        if rollouts is not None:
            batches.replace = rollouts.replace
        left = sum(len(rows[row].input_ids) for batch in plan[record.micro_batches :] for row in batch)
        with _progress(method.name, left, args.process_index == 0) as progress:
            try:
                trainer = DistillTrainer(
                    student=wrapped,
                    teacher=teachers[0],
                    batches=batches,
                    held_out=HeldOut(
                        held_rows,
                        held_plan,
                        settings.tokens,
                        teachers[1],
                        args.process_index,
                        args.world_size,
                    ),
                    development=development,
                    settings=settings,
                    record=record,
                    best=BestWeights(work_dir, writes=args.process_index == 0),
                    rollouts=rollouts,
                    progress=progress,
                    args=args,
                )
            except (ValueError, ImportError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"The trainer refuses these settings: {reason[:200]}.") from None
            if trainer.is_fsdp_enabled and isinstance(teachers[0], LiveTeacher):
                teachers[0].shard()
            if not trainer.has_waited_enough:  # a run that was killed after it had stopped early stays so
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    state, chosen_step, choice = _chosen_state(trainer, settings)
    notes.append(choice)
    if development and (finished := record.held_out[-1]["development_finished"]) < _MOST_FINISH:
        notes.append(
            f"Only {finished:.0%} of the answers to the development set ended within development_tokens "
            f"({settings.development_tokens}); what was cut off counts as it stands."
        )
    if args.process_index == 0:
        overlay_checkpoint(
            base=student,
            out=out,
            replacements=method.replacements(readers[0], state),
            shards=settings.shards,
            max_shard_size=settings.max_shard_size,
        )
    PartialState().wait_for_everyone()
    return {
        "method": method.name,
        "steps": record.step,
        "num_tokens": record.tokens,
        "num_response_tokens": record.response_tokens,
        "num_loss_tokens": record.counted_tokens,
        "tokens_per_s": record.tokens / record.seconds if record.seconds else None,
        "seconds": record.seconds,
        "losses": record.losses,
        "held_out": record.held_out,
        "held_out_tokens": trainer.num_held_out_tokens,
        "chosen_step": chosen_step,
        "best_step": record.best_step,
        "skipped_steps": record.skipped,
        "padding_efficiency": record.padding_efficiency,
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "trainable_parameters": trainer.num_trainable,
        "world_size": args.world_size,
        "device": args.device.type,
        "corpora": corpus.sources(row for batch in plan[: record.micro_batches] for row in batch),
        "held_out_corpus": held.sources(range(len(held.rows)))[0],
        "hyperparameters": {**method.options, **asdict(settings)},
        "notes": notes,
    }


def _teachers(
    model: PreTrainedModel,
    readers: tuple[CheckpointReader, CheckpointReader],
    rows: tuple[Any, Any],
    plans: tuple[Plan, Plan],
    hashes: tuple[str, str],
    args: TrainingArguments,
    settings: TrainingSettings,
    work_dir: Path,
    notes: list[str],
) -> tuple[Teacher, Teacher]:
    """Where the teacher's targets come from, for the corpus and for the held-out text."""
    student_head = head_of(model)

    def load_teacher() -> PreTrainedModel:
        return load_model(
            readers[1].folder,
            dtype=product_dtype(settings.precision),
            device=args.device,
            trust_remote_code=settings.trust_remote_code,
        ).requires_grad_(False)

    if settings.teacher_mode != "live":
        return cached_teacher(
            readers, student_head, rows, plans, hashes, load_teacher, args, settings, work_dir, notes
        )
    loaded = load_teacher()
    if saved := share_frozen(model, loaded):
        notes.append(f"Teacher and student share {saved:,} bytes of frozen weights.")
    live = LiveTeacher(loaded)
    return live, live


def uses_fsdp() -> bool:
    """Whether accelerate was asked for FSDP (its launcher says so in the environment)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def _held_out_tokens(rows: list[Encoded], plan: Plan, settings: TrainingSettings) -> int:
    """How much held-out text is measured: where the settings do not say, a tenth of the run's time.

    A token costs about 0.4 of a training token there.
    """
    if settings.held_out_tokens is not None:
        return settings.held_out_tokens
    planned = sum(len(rows[row].input_ids) for batch in plan for row in batch)
    evaluations = settings.max_steps // settings.evaluation_interval + 1
    return min(max(planned // (4 * evaluations), 2_048), 16_384)


def _check_student(model: PreTrainedModel, folder: Path) -> None:
    try:
        check_head(model)
    except RunError:
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise RunError(
                    f"In {folder}, {name} holds values that are not finite; make it anew."
                ) from None
        raise


def _chosen_state(trainer: DistillTrainer, settings: TrainingSettings) -> tuple[dict[str, Tensor], int, str]:
    """The weights to publish, the step they are from, and a sentence that says why."""
    record = trainer.record
    last = trainer.trained_state()
    if settings.select_by == "last":
        return last, record.step, f"The weights are those of the last step, {record.step}."
    if record.best_step is None:
        raise RunError("No held-out evaluation gave a finite KL; look at the held-out text.")
    measured = f"held-out KL {record.best_kl:.4f}"
    if record.best_development is not None:
        measured = f"{record.best_development:.1%} of the development set's instructions, {measured}"
    early = f"; training stopped early at step {record.step}" if trainer.has_waited_enough else ""
    if record.best_step == 0:
        return {}, 0, f"No step beat the untrained student ({measured}); its weights were kept{early}."
    if record.best_step == record.step:
        return (
            last,
            record.step,
            f"The weights are those of the last step, {record.step}, the best ({measured}).",
        )
    chosen = f"The weights are those of step {record.best_step}, the best ({measured}){early}."
    return trainer.best.load(record.best_step), record.best_step, chosen


@contextlib.contextmanager
def _progress(name: str, total: float, shown: bool) -> Iterator[Progress | None]:
    if not shown:
        yield None
        return
    with Progress(name, total, "tokens") as progress:
        yield progress


def _remedies(settings: TrainingSettings) -> list[str]:
    remedies = [f"halve batch_tokens ({settings.batch_tokens}) and double gradient_accumulation_steps"]
    if not settings.gradient_checkpointing:
        remedies.append("set gradient_checkpointing: true")
    if settings.teacher_mode == "live":
        remedies.append("set teacher_mode: cached")
    return remedies

"""Distillation: the pruned model learns its parent's next-token distributions."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from regrow.checkpoint import CheckpointReader
from regrow.training.engine import Method, run_training
from regrow.training.result import changed_tensors
from regrow.training.settings import CorpusSpec, TrainingSettings
from regrow.training.student import set_precision, stored_dtypes, trained_names


def distill(
    *,
    student: Path,
    teacher: Path,
    corpora: list[CorpusSpec],
    held_out: CorpusSpec,
    out: Path,
    work_dir: Path,
    train: str = "all_but_embeddings",
    **options: Any,
) -> dict[str, Any]:
    """Train a student toward its frozen teacher and write the result as a model folder.

    The loss is a divergence over the full vocabulary (forward KL by default; Hinton et al., arXiv
    1503.02531), computed from both models' final hidden states without holding logits.

    Args:
        student: the pruned model's folder.
        teacher: the parent's folder.
        corpora: (source, split, weight, limit) each.
        held_out: likewise; measured between steps.
        out: the new model folder: `student` with the trained tensors replaced, all else bit for bit.
        work_dir: checkpoints, logs and cached states; a killed run goes on from there.
        train: `"mlp"`, or `"all_but_embeddings"` (the embedding and the output layer never move).
        options: fields of `TrainingSettings`.

    Returns:
        `steps`, `num_tokens`, `num_response_tokens`, `tokens_per_s`, `seconds`, `losses`
        ({step, loss, learning_rate, tokens, grad_norm}), `held_out` ({step, kl, top1_agreement,
        top5_agreement}), `best_step`, `chosen_step`, `padding_efficiency`, `peak_memory_bytes`,
        `trainable_parameters`, `hyperparameters`, `notes` and more.

    Raises:
        UserError: arguments, models or corpora do not fit, or `work_dir` belongs to another run.
        RunError: loss not finite, out of memory, disk full.
    """
    settings = TrainingSettings(**options)

    def prepare(model: PreTrainedModel, reader: CheckpointReader) -> tuple[nn.Module, list[str]]:
        names = trained_names(reader, model, train)
        set_precision(model, names, stored_dtypes(reader), settings.precision)
        return model, []

    method = Method("distill", {"train": train}, prepare, changed_tensors)
    return run_training(
        method,
        student=Path(student),
        teacher=Path(teacher),
        corpora=corpora,
        held_out=held_out,
        out=Path(out),
        work_dir=Path(work_dir),
        settings=settings,
    )

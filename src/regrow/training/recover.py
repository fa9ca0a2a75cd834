"""Recovery: LoRA adapters trained with the distillation loss and merged into the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import Values
from regrow.errors import UserError
from regrow.training.engine import Method, run_training
from regrow.training.lora import DEFAULT_TARGETS, add_adapters, merged_tensors
from regrow.training.settings import CorpusSpec, TrainingSettings
from regrow.training.student import set_precision, stored_dtypes


def recover(
    *,
    student: Path,
    teacher: Path,
    corpora: list[CorpusSpec],
    held_out: CorpusSpec,
    out: Path,
    work_dir: Path,
    rank: int = 32,
    alpha: int = 64,
    dropout: float = 0.0,
    targets: tuple[str, ...] = DEFAULT_TARGETS,
    linear_attention: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train LoRA adapters on a student toward its teacher and write the merged model.

    Arguments, report and errors are those of `distill`, except:

    Args:
        student, teacher, corpora, held_out, out, work_dir, options: see `distill`.
        rank, alpha, dropout: LoRA's; the update is scaled by alpha / rank.
        targets: last names of the linear layers that get adapters.
        linear_attention: the linear-attention projections too.
    """
    settings = TrainingSettings(**options)
    if not 0 <= dropout < 1 or rank < 1 or alpha < 1:
        raise UserError(
            f"LoRA with rank {rank}, alpha {alpha}, dropout {dropout} cannot be; check the recipe."
        )

    def prepare(model: PreTrainedModel, reader: CheckpointReader) -> tuple[nn.Module, list[str]]:
        set_precision(model, [], stored_dtypes(reader), settings.precision)
        return add_adapters(
            model,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            targets=targets,
            linear_attention=linear_attention,
            seed=settings.seed,
            fp32_adapters=settings.precision != "bf16",
        )

    def replacements(reader: CheckpointReader, state: Mapping[str, Tensor]) -> dict[str, Values]:
        return merged_tensors(reader, state, rank=rank, alpha=alpha)

    lora = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "targets": list(targets),
        "linear_attention": linear_attention,
    }
    return run_training(
        Method("recover", lora, prepare, replacements),
        student=Path(student),
        teacher=Path(teacher),
        corpora=corpora,
        held_out=held_out,
        out=Path(out),
        work_dir=Path(work_dir),
        settings=settings,
    )

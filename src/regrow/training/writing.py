"""Who writes for a student that is being trained: the model itself, or vLLM from a copy of it on disk.

vLLM's engine is started for one batch of answers and ended before training goes on, which then has the GPU to
itself again. What it reads are the weights that the run would publish at that moment.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import Values, overlay_checkpoint
from regrow.errors import UserError
from regrow.modeling.generate import Conversation, Response, generate_responses
from regrow.modeling.writers import open_writer
from regrow.training.checkpoints import staging_folder
from regrow.training.memory import answers_fit, share_for_vllm
from regrow.training.student import HiddenStates, bf16_products, product_dtype

# (student as it is now, conversations, **options of a `Writer`) -> one response per conversation
Answer = Callable[..., list[Response]]
Replacements = Callable[[CheckpointReader, Mapping[str, Tensor]], dict[str, Values]]


def find_answer(
    engine: str,
    *,
    tokenizer: Any,
    base: CheckpointReader,
    replacements: Replacements,
    work_dir: Path,
    precision: str,
    trust_remote_code: bool,
    world_size: int = 1,
) -> Answer:
    """Who writes for the student, by the name of the engine.

    Args:
        engine: checked by `require_engine`.
        tokenizer: the student's.
        base: the checkpoint that the student was loaded from.
        replacements: trained state (name -> values) -> new values of the checkpoint's tensors.
        work_dir: where the copy lies while vLLM writes.
        precision, trust_remote_code: as in the recipe.
        world_size: processes that train.

    Raises:
        UserError: vLLM was asked for under several processes.
    """
    if engine == "transformers":
        return partial(own_answers, tokenizer=tokenizer)
    if world_size > 1:
        raise UserError(
            f"Each of the {world_size} processes would start vLLM on the first GPU; set "
            "rollout_engine: transformers, or train in one process."
        )
    return partial(
        vllm_answers,
        base=base,
        replacements=replacements,
        folder=staging_folder(work_dir),  # emptied when a killed run goes on
        dtype=product_dtype(precision),
        trust_remote_code=trust_remote_code,
    )


def own_answers(
    student: HiddenStates,
    conversations: Sequence[Conversation],
    *,
    tokenizer: Any,
    batch_size: int,
    **options: Any,
) -> list[Response]:
    """What the student writes itself, in the precision of its training; see `generate_responses`.

    Raises:
        RunError: memory is too small for `batch_size` answers at a time.
    """
    device = next(student.parameters()).device
    with bf16_products(device, student.autocast), answers_fit(batch_size):
        return generate_responses(student.model, tokenizer, conversations, batch_size=batch_size, **options)


def vllm_answers(
    student: HiddenStates,
    conversations: Sequence[Conversation],
    *,
    base: CheckpointReader,
    replacements: Replacements,
    folder: Path,
    dtype: str,
    trust_remote_code: bool,
    **options: Any,
) -> list[Response]:
    """What vLLM writes with the student's present weights; `folder` holds a copy of them for so long.

    Raises:
        UserError: vLLM refuses the model or the memory that is left to it.
        RunError: the weights are not finite, or the disk is full.
    """
    device = next(student.parameters()).device
    state = {name: parameter.detach().cpu() for name, parameter in student.trained().items()}
    try:
        overlay_checkpoint(base=base.folder, out=folder / "student", replacements=replacements(base, state))
        writer = open_writer(
            folder / "student",
            engine="vllm",
            dtype=dtype,
            device=device.type,
            trust_remote_code=trust_remote_code,
            gpu_memory_utilization=share_for_vllm(device),
        )
        with contextlib.closing(writer):
            return writer(conversations, **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""Where the teacher's final hidden states come from: a frozen model that runs along, or a store on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from regrow.checkpoint import CheckpointReader
from regrow.data.templates import Encoded
from regrow.errors import UserError
from regrow.modeling.hidden import Head, causal_model, final_hidden, head_of
from regrow.progress import Progress
from regrow.training.rows import Batch, Plan, Tokens, collate
from regrow.training.settings import TrainingSettings
from regrow.training.states import StateStore


class Teacher(Protocol):
    """Gives, for a micro-batch, the teacher's states at the positions that count."""

    @property
    def head(self) -> Head:
        """The teacher's output layer."""

    def states(self, batch: Batch) -> Tensor:
        """Final hidden states [T, D] at `batch.positions`, in row-major order."""


class LiveTeacher:
    """A frozen model in eval mode.

    Args:
        model: the causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = head_of(model)

    def shard(self) -> None:
        """Spread the decoder's weights over all processes (FSDP2); the output layer stays whole."""
        decoder = causal_model(self.model).get_decoder()
        blocks = set(getattr(self.model, "_no_split_modules", None) or ())
        for module in decoder.modules():
            if type(module).__name__ in blocks:
                fully_shard(module)
        fully_shard(decoder)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Run the model."""
        return final_hidden(self.model, batch.input_ids)[batch.positions]


class CachedTeacher:
    """States from a store; the output layer is the student's, or loaded without the rest of the model.

    Args:
        store: filled by `fill_store`.
        head: the teacher's output layer.
        device: where the states are wanted.
    """

    def __init__(self, store: StateStore, head: Head, device: torch.device) -> None:
        self._store, self.head, self._device = store, head, device

    def states(self, batch: Batch) -> Tensor:
        """Read the rows of the batch."""
        states = torch.cat([self._store.read(row) for row in batch.rows])
        return states.to(self._device, self.head.weight_VD.dtype, non_blocking=True)


def fill_store(
    store: StateStore,
    rows: Sequence[Encoded],
    plan: Sequence[tuple[int, ...]],
    tokens: Tokens,
    make_teacher: Callable[[], LiveTeacher],
    device: torch.device,
) -> int:
    """Run the teacher over the planned rows that the store lacks; returns their tokens.

    A killed run goes on with the rows that are missing. The teacher is only made when there are some.

    Args:
        store: the store.
        rows: the corpus that the plan's numbers refer to.
        plan: micro-batches; each row is run in the first one that holds it.
        tokens: which positions are stored.
        make_teacher: loads the teacher.
        device: where it runs.
    """
    missing = set(store.missing([row for batch in plan for row in batch]))
    if not missing:
        return 0
    teacher = make_teacher()
    total = sum(len(rows[row].input_ids) for row in missing)
    with Progress("teacher's hidden states", total, "tokens") as progress:
        for planned in plan:
            numbers = [row for row in dict.fromkeys(planned) if row in missing]
            if not numbers:
                continue
            batch = collate([rows[row] for row in numbers], tokens, numbers).to(device)
            counts = batch.positions.sum(1).tolist()
            for row, states in zip(numbers, teacher.states(batch).split(counts), strict=True):
                store.write(row, states)
            missing.difference_update(numbers)
            progress.advance(batch.num_tokens)
    store.flush()
    return total


def head_tensor(reader: CheckpointReader) -> str:
    """The name of the checkpoint's tensor that the output layer multiplies with.

    Raises:
        UserError: there is none.
    """
    embedding = None
    for name in reader.tensors:
        if name.endswith("lm_head.weight") and not name.startswith("mtp."):
            return name
        if name.endswith("embed_tokens.weight") and not name.startswith("mtp."):
            embedding = name
    if embedding is None:
        raise UserError(f"{reader.folder} has neither an output layer nor an embedding; fetch it again.")
    return embedding


def same_tensor(left: CheckpointReader, right: CheckpointReader, names: tuple[str, str]) -> bool:
    """Whether two checkpoints hold the same values under two names."""
    one, other = left.tensors[names[0]], right.tensors[names[1]]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return left.read_bytes(names[0]) == right.read_bytes(names[1])


def teacher_head(
    teacher: CheckpointReader, student: CheckpointReader, student_head: Head, load: Callable[[], Any]
) -> Head:
    """The teacher's output layer without its model.

    It is the student's frozen one where both checkpoints hold the same matrix (pruning never touches it) and
    nothing else acts on the logits; otherwise the teacher is loaded and its layer copied.
    """
    names = (head_tensor(teacher), head_tensor(student))
    if student_head.bias_V is None and same_tensor(teacher, student, names):
        return student_head
    head = head_of(load())
    bias = None if head.bias_V is None else head.bias_V.detach().clone()
    return Head(head.weight_VD.detach().clone(), bias, head.softcap, head.scale)


def cached_teacher(
    readers: tuple[CheckpointReader, CheckpointReader],
    student_head: Head,
    rows: tuple[Sequence[Encoded], Sequence[Encoded]],
    plans: tuple[Plan, Plan],
    hashes: tuple[str, str],
    load: Callable[[], nn.Module],
    args: TrainingArguments,
    settings: TrainingSettings,
    work_dir: Path,
    notes: list[str],
) -> tuple[Teacher, Teacher]:
    """Teachers from stores in `work_dir`, which are filled first where rows are missing.

    Args:
        readers: the student's and the teacher's checkpoint.
        student_head: the student's frozen output layer.
        rows, plans, hashes: of the corpus and of the held-out text.
        load: loads the teacher's model; called at most once, and not at all when the stores are full.
        args: rank, number of processes and device; each process fills its share.
        settings, work_dir: the run's.
        notes: a sentence is added.
    """
    loaded: list[nn.Module] = []

    def load_once() -> nn.Module:
        if not loaded:
            loaded.append(load())
        return loaded[0]

    head = teacher_head(readers[1], readers[0], student_head, load_once)
    teachers: list[Teacher] = []
    for name, some, plan, digest in zip(("corpus", "held_out"), rows, plans, hashes, strict=True):
        positions = [int(collate([row], settings.tokens).positions.sum()) for row in some]
        identity = {
            "teacher": readers[1].fingerprint(),
            "text": digest,
            "tokens": settings.tokens,
            "sequence_length": settings.sequence_length,
        }
        folder = work_dir / "teacher_states" / name
        with args.main_process_first(local=False):
            store = StateStore(folder, identity, positions, head.weight_VD.shape[1])
        share = [tuple(row for row in batch if row % args.world_size == args.process_index) for batch in plan]
        fill_store(store, some, share, settings.tokens, lambda: LiveTeacher(load_once()), args.device)
        PartialState().wait_for_everyone()
        teachers.append(CachedTeacher(store, head, args.device))
        notes.append(f"The teacher's hidden states of the {name.replace('_', '-')} come from disk (bf16).")
    return teachers[0], teachers[1]

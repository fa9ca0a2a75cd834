"""Where what the student learns from comes from: a frozen model that runs along, or a store on disk."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
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
from regrow.training.forms import Form, HiddenForm, SparseForm, Targets
from regrow.training.rows import Batch, Plan, collate
from regrow.training.settings import TrainingSettings
from regrow.training.store import TokenStore
from regrow.types import Tokens

_TEXTS = {"corpus": "corpus", "held_out": "held-out text"}


class Teacher(Protocol):
    """Gives, for a micro-batch, what is known of the teacher at the positions that count."""

    @property
    def head(self) -> Head | None:
        """The teacher's output layer; None where the targets are not hidden states."""

    def targets(self, batch: Batch) -> Targets:
        """Final hidden states [T, D] or sparse targets at `batch.positions`, in row-major order."""


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
    def targets(self, batch: Batch) -> Tensor:
        """Run the model; final hidden states."""
        return final_hidden(self.model, batch.input_ids)[batch.positions]


class CachedTeacher:
    """Targets from a store.

    Args:
        store: filled by `fill_store`.
        form: what it holds.
        head: the output layer that hidden states need (the student's, or loaded without its model), or None.
        device: where the targets are wanted.
    """

    def __init__(self, store: TokenStore, form: Form, head: Head | None, device: torch.device) -> None:
        self._store, self._form, self.head, self._device = store, form, head, device

    def targets(self, batch: Batch) -> Targets:
        """Read the rows of the batch."""
        records_T = np.concatenate([self._store.read(row) for row in batch.rows])
        return self._form.decode(records_T).to(self._device)


def fill_store(
    store: TokenStore,
    form: Form,
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
        form: what it keeps.
        rows: the corpus that the plan's numbers refer to.
        plan: micro-batches; each row is run in the first one that holds it.
        tokens: which positions are stored.
        make_teacher: loads the teacher.
        device: where it runs.
    """
    missing = set(store.missing([row for batch in plan for row in batch]))
    if not missing:
        return 0
    store.reserve(sorted(missing))
    teacher = make_teacher()
    total = sum(len(rows[row].input_ids) for row in missing)
    with Progress("teacher", total, "tokens") as progress:
        for planned in plan:
            numbers = [row for row in dict.fromkeys(planned) if row in missing]
            if not numbers:
                continue
            batch = collate([rows[row] for row in numbers], tokens, numbers).to(device)
            counts = batch.positions.sum(1).tolist()
            records_T = form.encode(teacher.targets(batch), teacher.head, numbers, counts)
            for row, part in zip(numbers, np.split(records_T, np.cumsum(counts)[:-1]), strict=True):
                store.write(row, part)
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


def check_vocabularies(student: CheckpointReader, teacher: CheckpointReader) -> None:
    """Raises:
    UserError: the two models do not predict the same number of tokens.
    """
    ours, theirs = (reader.tensors[head_tensor(reader)].shape[0] for reader in (student, teacher))
    if ours != theirs:
        raise UserError(
            f"The vocabularies differ: {student.folder} has {ours} tokens, {teacher.folder} {theirs}; use "
            "the model's own parent."
        )


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


def store_forms(settings: TrainingSettings, head: Head | None, vocab_size: int) -> tuple[Form, Form]:
    """What is kept of the corpus and of the held-out text.

    The held-out KL is measured as everywhere, at temperature 1, and without the noise of draws.

    Args:
        settings: the run's.
        head: the teacher's output layer where hidden states are kept.
        vocab_size: V.
    """
    if head is not None:
        hidden = HiddenForm(head.weight_VD.shape[1])
        return hidden, hidden
    entries = settings.teacher_entries
    held_out = SparseForm("top_k", min(entries, vocab_size), temperature=1.0)
    if settings.teacher_mode == "sampled":
        return SparseForm("sampled", entries, settings.temperature, settings.seed), held_out
    return replace(held_out, temperature=settings.temperature), held_out


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

    head = None
    if settings.teacher_mode == "cached":
        head = teacher_head(readers[1], readers[0], student_head, load_once)
    forms = store_forms(settings, head, student_head.weight_VD.shape[0])
    teachers: list[Teacher] = []
    for name, form, some, plan, digest in zip(_TEXTS, forms, rows, plans, hashes, strict=True):
        positions = [int(collate([row], settings.tokens).positions.sum()) for row in some]
        identity = {
            "teacher": readers[1].fingerprint(),
            "text": digest,
            "tokens": settings.tokens,
            "sequence_length": settings.sequence_length,
            **form.identity,
        }
        folder = work_dir / "teacher" / name
        with args.main_process_first(local=False):
            store = TokenStore(folder, identity, positions, form.dtype)
        share = [tuple(row for row in batch if row % args.world_size == args.process_index) for batch in plan]
        fill_store(store, form, some, share, settings.tokens, lambda: LiveTeacher(load_once()), args.device)
        PartialState().wait_for_everyone()
        teachers.append(CachedTeacher(store, form, head, args.device))
        notes.append(form.note(_TEXTS[name]))
    return teachers[0], teachers[1]

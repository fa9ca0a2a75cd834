"""Which rows are in which micro-batch of a run, and which of their tokens count in the loss.

The whole run is planned before it starts, as one list of micro-batches: a resumed run, and a run on another
number of processes, go on at the same place of the same list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regrow.data.batches import pad_batch, plan_batches
from regrow.data.blend import EncodedCorpus
from regrow.data.templates import Encoded
from regrow.types import Tokens

Plan = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        input_ids, attention_mask: [B, S], padded on the right.
        positions: bool [B, S], True at t where the model's prediction of token t + 1 counts.
        rows: the rows' numbers in the corpus, in order (negative for text that the student wrote).
        response_tokens: tokens that the assistant wrote.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    rows: tuple[int, ...] = ()
    response_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return int(self.attention_mask.sum())

    @property
    def labels(self) -> Tensor:
        """The token that follows each counted position [T]."""
        return self.input_ids[:, 1:][self.positions[:, :-1]]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.rows,
            self.response_tokens,
        )


def collate(rows: Sequence[Encoded], tokens: Tokens, numbers: Sequence[int] = ()) -> Batch:
    """Pad rows into a batch; no position counts whose next token is a pad or beyond the row."""
    padded = pad_batch(rows)
    counts = padded["attention_mask"].bool() if tokens == "all" else padded["response_mask"]
    positions = torch.zeros_like(counts)
    positions[:, :-1] = counts[:, 1:]
    written = int(padded["response_mask"].sum())
    return Batch(padded["input_ids"], padded["attention_mask"], positions, tuple(numbers), written)


def plan_run(
    corpus: EncodedCorpus, *, batch_tokens: int, seed: int, num_batches: int
) -> list[tuple[int, ...]]:
    """The first `num_batches` micro-batches over as many passes as it takes, as row numbers."""
    plan: list[tuple[int, ...]] = []
    epoch = 0
    while len(plan) < num_batches:
        numbers = corpus.one_pass(epoch)
        lengths = [len(corpus.rows[number].input_ids) for number in numbers]
        batches = plan_batches(lengths, batch_tokens=batch_tokens, seed=seed, epoch=epoch)
        plan += [tuple(numbers[index] for index in batch) for batch in batches]
        epoch += 1
    return plan[:num_batches]


def plan_held_out(
    rows: Sequence[Encoded], *, batch_tokens: int, max_tokens: int
) -> tuple[list[tuple[int, ...]], int]:
    """Micro-batches of the first held-out rows within `max_tokens` (at least one), and how many rows."""
    chosen, total = 0, 0
    for row in rows:
        if chosen and total + len(row.input_ids) > max_tokens:
            break
        chosen, total = chosen + 1, total + len(row.input_ids)
    lengths = [len(row.input_ids) for row in rows[:chosen]]
    return [tuple(b) for b in plan_batches(lengths, batch_tokens=batch_tokens, seed=0, epoch=0)], chosen


@dataclass
class RunBatches(Dataset[Batch]):
    """What one process sees: item i is its i-th micro-batch of the run.

    Attributes:
        rows: the corpus.
        plan: micro-batches of all processes, as `plan_run` gives them.
        tokens: which tokens count.
        rank, world_size: this process.
        start: items of this process that lie behind it (from the checkpoint).
        consumed: micro-batches of the plan that lie behind all processes.
        replace: gives rows that stand in for a planned micro-batch (what the student wrote), or None.
    """

    rows: Sequence[Encoded]
    plan: Sequence[tuple[int, ...]]
    tokens: Tokens
    rank: int = 0
    world_size: int = 1
    start: int = 0
    consumed: int = 0
    replace: Callable[[int], list[Encoded] | None] = field(default=lambda position: None)

    def __len__(self) -> int:
        return self.start + (len(self.plan) - self.consumed) // self.world_size

    def position(self, item: int) -> int:
        """The place in the plan of this process' item."""
        return self.consumed + (item - self.start) * self.world_size + self.rank

    def __getitem__(self, item: int) -> Batch:
        if not self.start <= item < len(self):
            raise IndexError(item)
        position = self.position(item)
        written = self.replace(position)
        if written is not None:
            return collate(written, "response", [-1] * len(written))
        numbers = self.plan[position]
        return collate([self.rows[number] for number in numbers], self.tokens, numbers)


def only_item(items: list[Batch]) -> dict[str, Any]:
    """The collate function of a loader whose items are whole micro-batches; the Trainer wants a mapping."""
    (batch,) = items
    return {"batch": batch}

"""How close the student is to its teacher on text that it is not trained on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from regrow.data.templates import Encoded
from regrow.losses import SparseTargets, divergence_metrics, sparse_linear_kl
from regrow.modeling.hidden import Head
from regrow.training.forms import Targets
from regrow.training.rows import Batch, collate
from regrow.training.student import head_arguments
from regrow.training.teacher import Teacher
from regrow.types import Tokens


class HeldOut(Dataset[Any]):
    """A fixed set of held-out micro-batches with the teacher's targets, which are computed once.

    Args:
        rows: held-out rows.
        plan: micro-batches of row numbers.
        tokens: which positions count.
        teacher: gives the targets, which are kept in memory: hidden states as bf16 (2 D bytes per token), or
            in fp32 where the teacher runs in fp32; or its most likely tokens (8 K bytes).
        rank, world_size: each process measures its share.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        plan: Sequence[tuple[int, ...]],
        tokens: Tokens,
        teacher: Teacher,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._batches = [collate([rows[row] for row in numbers], tokens, numbers) for numbers in plan]
        self._teacher: Teacher | None = teacher
        self._teacher_head = teacher.head
        self._rank, self._world_size = rank, world_size
        self._targets: dict[int, Targets] = {}

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def num_tokens(self) -> int:
        """Positions that count, over all processes."""
        return sum(int(batch.positions.sum()) for batch in self._batches)

    @torch.no_grad()
    def sums(self, student: nn.Module, head: Head, device: torch.device) -> Tensor:
        """This process' sums of KL, top-1 and top-5 agreement, and its number of tokens, fp64 [4].

        Every process runs equally many batches (sharded models meet in each of them); one without a batch
        left repeats its first and does not count it.
        """
        totals = torch.zeros(4, dtype=torch.float64, device=device)
        rounds = -(-len(self._batches) // self._world_size)
        for turn in range(rounds):
            number = turn * self._world_size + self._rank
            counts = number < len(self._batches)
            batch = self._batches[number if counts else 0].to(device)
            hidden_TD = student(batch.input_ids)[batch.positions]
            targets = self._teacher_targets(number if counts else 0, batch)
            if not counts:
                continue
            hidden_TD = hidden_TD.to(head.weight_VD.dtype)
            heads = head_arguments(student=head, teacher=self._teacher_head)
            if isinstance(targets, SparseTargets):
                sums = sparse_linear_kl(hidden_TD, targets=targets, return_metrics=True, **heads).metrics
                measured = (sums["kl"], sums["top1_agreement"], sums["top5_agreement"])
            else:
                metrics = divergence_metrics(hidden_TD, targets, **heads)
                measured = (metrics.kl, metrics.top1, metrics.top5)
            for index, values in enumerate(measured):
                totals[index] += values.double().sum()
            totals[3] += hidden_TD.shape[0]
        return totals

    def release_teacher(self, device: torch.device) -> None:
        """Have all that the teacher has to say said now, so that its model need not stay in memory."""
        for number, batch in enumerate(self._batches):
            self._teacher_targets(number, batch.to(device))
        self._teacher = None

    def _teacher_targets(self, number: int, batch: Batch) -> Targets:
        if number not in self._targets:
            assert self._teacher is not None
            self._targets[number] = self._teacher.targets(batch).to("cpu")
        return self._targets[number].to(batch.input_ids.device)


def figures(totals: Tensor) -> dict[str, float]:
    """Means per token from the sums of all processes."""
    kl, top1, top5, count = totals.tolist()
    return {"kl": kl / count, "top1_agreement": top1 / count, "top5_agreement": top5 / count}

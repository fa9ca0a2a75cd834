"""Batches of a fixed token budget: rows of like length together, padded on the right, never packed.

Packing leaks: linear-attention layers carry their state from one packed sequence into the next.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from regrow.data.templates import Encoded

_BUCKET_BATCHES = 16


def plan_batches(lengths: Sequence[int], *, batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of every batch of one epoch.

    Args:
        lengths: tokens per row.
        batch_tokens: the most tokens of a batch, padding counted; a longer row is a batch of its own.
        seed, epoch: the plan depends on these and the lengths only.

    Returns:
        batches whose rows are of similar length, in shuffled order; every row is in exactly one.
    """
    if batch_tokens < 1:
        raise ValueError("batch_tokens must be positive")
    shuffler = random.Random(f"{seed}-{epoch}")
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    # Rows are sorted by length within windows of several batches only, so that batches differ from one epoch
    # to the next.
    mean = max(sum(lengths) / max(len(lengths), 1), 1.0)
    window = max(int(_BUCKET_BATCHES * batch_tokens / mean), 1)
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        batch: list[int] = []
        for row in sorted(order[start : start + window], key=lambda index: lengths[index]):
            if batch and lengths[row] * (len(batch) + 1) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(row)
        if batch:
            batches.append(batch)
    shuffler.shuffle(batches)
    return batches


def padding_efficiency(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Real tokens over tokens computed, pads included; 1.0 is perfect."""
    real = sum(lengths[row] for batch in batches for row in batch)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches if batch)
    return real / padded if padded else 1.0


def pad_batch(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` (int64) and `response_mask` (bool), each [B, S], padded on the right.

    The pad token is 0, whatever the tokenizer says: the mask keeps it out of everything.
    """
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    response_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[index, :size] = torch.tensor(row.input_ids)
        attention_mask[index, :size] = 1
        response_mask[index, :size] = torch.tensor(row.response_mask)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}

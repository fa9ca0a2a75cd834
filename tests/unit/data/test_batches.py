import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.data.batches import pad_batch, padding_efficiency, plan_batches
from regrow.data.templates import Encoded

lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@settings(max_examples=100, deadline=None)
@given(lengths_of_rows, st.integers(1, 2_000), st.integers(0, 3), st.integers(0, 3))
def test_every_row_once_and_within_the_budget(lengths, budget, seed, epoch):
    batches = plan_batches(lengths, batch_tokens=budget, seed=seed, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    assert 0 < padding_efficiency(lengths, batches) <= 1


def test_plan_depends_on_seed_and_epoch_only():
    lengths = [(7 * i) % 61 + 1 for i in range(500)]
    plans = {
        (seed, epoch): plan_batches(lengths, batch_tokens=512, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert plans[0, 0] == plan_batches(lengths, batch_tokens=512, seed=0, epoch=0)
    assert len({str(plan) for plan in plans.values()}) == 4
    # other rows meet each other in the next epoch, not only other orders of the same batches
    first = {frozenset(batch) for batch in plans[0, 0]}
    assert sum(frozenset(batch) in first for batch in plans[0, 1]) < len(first) / 4


def test_bucketing_pays():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1_000, (2_000,), generator=generator).tolist()
    bucketed = plan_batches(lengths, batch_tokens=8_192, seed=0, epoch=0)
    unsorted = [list(range(i, min(i + 8, 2_000))) for i in range(0, 2_000, 8)]
    assert padding_efficiency(lengths, bucketed) > 0.9
    assert padding_efficiency(lengths, unsorted) < 0.65


def test_no_rows_and_no_budget():
    assert plan_batches([], batch_tokens=10, seed=0, epoch=0) == []
    assert padding_efficiency([], []) == 1.0
    with pytest.raises(ValueError, match="positive"):
        plan_batches([1], batch_tokens=0, seed=0, epoch=0)


def test_padding_by_hand():
    batch = pad_batch([Encoded([5, 6, 7], [False, True, True]), Encoded([8], [True])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["response_mask"].tolist() == [[False, True, True], [True, False, False]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.long
    assert batch["response_mask"].dtype == torch.bool

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from regrow.data.blend import EncodedCorpus, Part
from regrow.data.templates import Encoded
from regrow.training.rows import RunBatches, collate, only_item, plan_held_out, plan_run


def row(length, response=()):
    return Encoded(list(range(1, length + 1)), [index in response for index in range(length)])


def corpus_of(rows, *shares):
    """A blend of two corpora: the even rows and the odd ones, of which a pass takes so many."""
    numbers = [[n for n in range(len(rows)) if n % 2 == odd] for odd in (0, 1)]
    parts = [Part({}, some, share) for some, share in zip(numbers, shares or map(len, numbers), strict=True)]
    return EncodedCorpus(rows, [part for part in parts if part.numbers], "", [])


def test_positions_predict_the_next_real_token():
    batch = collate([row(4), row(2)], "all", [7, 9])
    assert batch.positions.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.rows == (7, 9)
    assert batch.num_tokens == 6


def test_response_positions_start_one_before_the_response():
    batch = collate([row(5, response={2, 3}), row(3, response={0, 2})], "response")
    assert batch.positions.tolist() == [
        [False, True, True, False, False],
        [False, True, False, False, False],  # token 0 has no prediction
    ]
    assert batch.response_tokens == 4


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    batch_tokens=st.integers(20, 200),
    num_batches=st.integers(1, 40),
    seed=st.integers(0, 3),
)
def test_plan_covers_every_row_once_per_epoch(lengths, batch_tokens, num_batches, seed):
    rows = [row(length) for length in lengths]
    corpus = corpus_of(rows)
    plan = plan_run(corpus, batch_tokens=batch_tokens, seed=seed, num_batches=num_batches)
    assert len(plan) == num_batches
    flat = [number for batch in plan for number in batch]
    epoch = len(rows)
    for begin in range(0, len(flat) - epoch + 1, epoch):
        assert sorted(flat[begin : begin + epoch]) == list(range(epoch))
    longer = plan_run(corpus, batch_tokens=batch_tokens, seed=seed, num_batches=num_batches + 5)
    assert longer[:num_batches] == plan


def test_plan_follows_the_passes():
    corpus = corpus_of([row(4) for _ in range(10)], 5, 2)  # even rows whole, two of the odd ones
    plan = plan_run(corpus, batch_tokens=4, seed=0, num_batches=21)
    passes = [sorted(number for (number,) in plan[begin : begin + 7]) for begin in (0, 7, 14)]
    assert passes == [sorted([0, 2, 4, 6, 8, *odd]) for odd in ((1, 3), (5, 7), (9, 1))]


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    steps=st.integers(1, 5),
    resume_world=st.integers(1, 4),
    done=st.integers(0, 4),
)
def test_processes_share_the_plan_and_a_resume_goes_on_where_it_stopped(
    world, accumulation, steps, resume_world, done
):
    """Whatever the numbers of processes before and after, no micro-batch is lost, repeated or reordered."""
    rows = [row(3 + index % 5) for index in range(200)]
    done = min(done, steps)
    consumed = done * accumulation * world
    total = consumed + (steps - done) * accumulation * resume_world
    plan = plan_run(corpus_of(rows), batch_tokens=16, seed=0, num_batches=total)
    seen = []
    loaders = []
    for rank in range(resume_world):
        dataset = RunBatches(
            rows, plan, "all", rank, resume_world, start=done * accumulation, consumed=consumed
        )
        assert len(dataset) == steps * accumulation
        loaders.append(
            [dataset[item].rows for item in range(done * accumulation, len(dataset))],
        )
    for together in zip(*loaders, strict=True):
        seen += together
    assert seen == plan[consumed:]


def test_what_the_student_wrote_replaces_a_batch():
    rows = [row(4), row(5)]
    written = [row(3, response={1, 2})]
    batches = RunBatches(
        rows, [(0,), (1,)], "all", replace=lambda position: written if position == 1 else None
    )
    assert batches[0].rows == (0,)
    assert batches[1].rows == (-1,)
    assert batches[1].positions.tolist() == [[True, True, False]]


def test_loader_gives_whole_micro_batches():
    rows = [row(4), row(5)]
    loader = DataLoader(RunBatches(rows, [(0, 1), (1,)], "all"), batch_size=1, collate_fn=only_item)
    assert [tuple(item["batch"].input_ids.shape) for item in loader] == [(2, 5), (1, 5)]


def test_held_out_is_bounded_by_tokens_and_has_at_least_one_row():
    rows = [row(10), row(10), row(10)]
    plan, count = plan_held_out(rows, batch_tokens=100, max_tokens=25)
    assert (sorted(n for batch in plan for n in batch), count) == ([0, 1], 2)
    assert plan_held_out(rows, batch_tokens=100, max_tokens=1)[1] == 1


def test_batch_moves_whole():
    batch = collate([row(3, response={1})], "all", [0])
    moved = batch.to(torch.device("cpu"))
    assert moved.response_tokens == batch.response_tokens
    assert moved.rows == batch.rows

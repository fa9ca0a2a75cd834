import itertools

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st

from regrow.checkpoint.shards import balanced_bounds, shard_files
from regrow.errors import UserError


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_balance_is_the_best_of_all_partitions(sizes, data):
    parts = data.draw(st.integers(1, len(sizes)))
    bounds = balanced_bounds(sizes, parts)

    def cost(cuts):
        return sum(sum(sizes[a:b]) ** 2 for a, b in itertools.pairwise(cuts))

    every = ((0, *inner, len(sizes)) for inner in itertools.combinations(range(1, len(sizes)), parts - 1))
    assert cost(bounds) == min(map(cost, every))
    assert all(a < b for a, b in itertools.pairwise(bounds))


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=3_000), st.data())
def test_any_number_of_shards_is_exact_ordered_and_without_an_empty_one(sizes, data):
    shards = data.draw(st.integers(1, min(len(sizes), 40)))
    names = {f"t{i}": size for i, size in enumerate(sizes)}
    files = shard_files(names, shards=shards)
    assert len(files) == shards
    assert all(files.values())
    assert [name for chosen in files.values() for name in chosen] == list(names)


def test_one_heavy_tensor_does_not_unbalance_the_others():
    sizes = {f"t{i}": 10 for i in range(150)} | {"embedding": 1_000} | {f"u{i}": 10 for i in range(150)}
    files = shard_files(sizes, shards=16)
    weights = sorted(sum(sizes[name] for name in chosen) for chosen in files.values())
    assert weights[-1] == 1_000
    assert weights[-2] <= 1.25 * weights[0]


def test_long_sequences_of_many_tensors_stay_balanced():
    sizes = {f"t{i}": 1_000 + i % 7 for i in range(50_000)}
    files = shard_files(sizes, shards=163)
    weights = [sum(sizes[name] for name in chosen) for chosen in files.values()]
    assert max(weights) < 1.2 * sum(weights) / 163


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=30),
    st.integers(1, 1_000),
)
def test_by_size_is_huggingface_hubs_result(sizes, limit):
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    mine = shard_files({name: t.numel() for name, t in tensors.items()}, max_shard_size=limit)
    assert mine == theirs.filename_to_tensors


def test_names_are_the_standard_ones():
    assert list(shard_files({"a": 1, "b": 1}, shards=1)) == ["model.safetensors"]
    assert list(shard_files({"a": 1, "b": 1}, shards=2)) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize(
    "asked",
    [
        {"shards": 3},
        {"shards": 0},
        {"shards": -1},
        {"shards": 1, "max_shard_size": "5GB"},
        {"max_shard_size": "5 apples"},
        {"max_shard_size": "1e9999GB"},
        {"max_shard_size": ""},
        {"max_shard_size": "infGB"},
        {"max_shard_size": "-1GB"},
        {"max_shard_size": 0},
        {"max_shard_size": "0GB"},
    ],
)
def test_impossible_requests_are_refused(asked):
    with pytest.raises(UserError):
        shard_files({"a": 1, "b": 1}, **asked)

"""The statistics file: written piece by piece, readable by safetensors, merged exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from regrow.errors import UserError
from regrow.pruning.accumulate import channel_sums
from regrow.pruning.statistics import Statistics, merge_statistics, open_statistics, site_layout

SITES = ("layers.0", "mtp.layers.0")
WIDTH, HIDDEN = 5, 3


def header(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "parent": "abc",
        "template": "t",
        "mode": "parent",
        "correlations": True,
        "num_tokens": 40,
        "num_held_out_tokens": 8,
        "num_sequences": 4,
        "corpora": [{"source": "a.jsonl", "hash": "h", "num_tokens": 48}],
        "notes": [],
        **changes,
    }


def write(path: Path, seed: int, **changes: Any) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    layout: dict[str, Any] = {}
    for site in SITES:
        layout |= site_layout(site, WIDTH, HIDDEN, correlations=True, fisher=False)
    values: dict[str, np.ndarray] = {}
    with open_statistics(path, layout) as writer:
        for name, (dtype, shape) in reversed(layout.items()):
            if dtype == "I64":
                value = np.array([40, 8])
            else:
                value = generator.normal(size=shape).astype({"F64": np.float64, "F32": np.float32}[dtype])
            values[name] = value
            writer.write(name, value)
        writer.header = header(**changes)
    return values


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    values = write(path, 0)
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    assert all(np.array_equal(loaded[name], values[name]) for name in values)
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["regrow"]) == header()


def test_reader_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    values = write(path, 0)
    statistics = Statistics(path)
    assert statistics.sites == list(SITES)
    assert statistics.num_tokens("layers.0") == (40, 8)
    assert statistics.has("layers.0", "gram")
    assert not statistics.has("layers.0", "fisher")
    for name, value in values.items():
        site, _, field = name.rpartition(".")
        assert np.array_equal(statistics.read(site, field), value)


def test_an_unfinished_file_never_appears(tmp_path: Path) -> None:
    layout = site_layout("layers.0", WIDTH, HIDDEN, correlations=False, fisher=True)
    with (
        pytest.raises(ValueError, match="never written"),
        open_statistics(tmp_path / "s.safetensors", layout) as writer,
    ):
        writer.write("layers.0.fisher", np.zeros(WIDTH))
    with pytest.raises(ValueError, match="shape"), open_statistics(tmp_path / "s", layout) as writer:
        writer.write("layers.0.fisher", np.zeros(WIDTH + 1))
    assert list(tmp_path.iterdir()) == []


def test_merging_adds_sums_and_counts(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    merged = merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    result = Statistics(tmp_path / "m")
    assert result.header == merged
    assert (merged["num_tokens"], merged["num_held_out_tokens"], merged["num_sequences"]) == (80, 16, 8)
    assert merged["corpora"] == [{"source": "a.jsonl", "hash": "h", "num_tokens": 96}]
    assert result.num_tokens("layers.0") == (80, 16)
    for name in a:
        site, _, field = name.rpartition(".")
        if field != "num_tokens":
            total = a[name].astype(np.float64) + b[name].astype(np.float64)
            assert np.array_equal(result.read(site, field), total.astype(a[name].dtype))


def test_weights_are_shares_of_the_tokens(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1, num_tokens=10)
    b = write(tmp_path / "b", 2, num_tokens=30)
    merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "m", weights=[1, 1])
    name = "layers.0.sum_squares"
    # Each corpus is worth half of the 40 tokens.
    expected = a[name] / 10 * 20 + b[name] / 30 * 20
    np.testing.assert_allclose(
        Statistics(tmp_path / "m").read("layers.0", "sum_squares"), expected, rtol=1e-12
    )
    with pytest.raises(UserError, match="positive weights"):
        merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "n", weights=[1])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"parent": "other"}, "the model"),
        ({"template": "u"}, "template"),
        ({"correlations": False}, "correlations"),
    ],
)
def test_files_that_do_not_go_together_are_refused(
    tmp_path: Path, change: dict[str, Any], names: str
) -> None:
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2, **change)
    with pytest.raises(UserError, match=names):
        merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        Statistics(path)
    write(path, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cut off"):
        Statistics(path)
    for damaged in (b"", whole[:100], b"\xff" * 64, b"\x08" + bytes(7) + b'{"a": 1}', bytes(64)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="no statistics file"):
            Statistics(path)
    write(path, 0, schema=99)
    with pytest.raises(UserError, match="schema"):
        Statistics(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 255, 256, 257, 700])
def test_channel_sums_are_those_of_fp64_whatever_the_blocks_and_leave_their_input_alone(num_tokens, dtype):
    x_TX = torch.randn(num_tokens, 7, generator=torch.Generator().manual_seed(0)).to(dtype) - 0.3
    before_TX, exact_TX = x_TX.clone(), x_TX.double()
    expected = torch.stack([exact_TX.square().sum(0), exact_TX.abs().sum(0), exact_TX.sum(0)])
    found = channel_sums(x_TX)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(x_TX, before_TX)

"""Perplexity by windows: which tokens count, and the figure against a naive computation."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.errors import UserError
from regrow.evaluation.perplexity import evaluate_perplexity, plan_windows
from regrow.modeling.load import load_model, load_tokenizer
from tiny_models import save_tiny_model


def test_disjoint_windows_leave_out_only_their_first_token() -> None:
    assert plan_windows(10, 4, 4) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]


def test_overlapping_windows_predict_every_token_once() -> None:
    assert plan_windows(10, 4, 2) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_windows_cover_the_text(num_tokens: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    windows = plan_windows(num_tokens, window, stride)
    predicted = [token for _, end, first in windows for token in range(first, end)]
    assert len(predicted) == len(set(predicted))
    assert all(end - begin <= window and begin < first for begin, end, first in windows)
    if stride < window:
        assert predicted == list(range(1, num_tokens))


@pytest.mark.parametrize(("stride", "batch_size"), [(None, 3), (5, 1), (5, 4)])
def test_perplexity_is_the_naive_one(tmp_path: Path, stride: int | None, batch_size: int) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    text = "The quick brown fox jumps over the lazy dog. " * 3
    (tmp_path / "text.txt").write_text(text)
    found = evaluate_perplexity(
        model=folder,
        data=str(tmp_path / "text.txt"),
        window=16,
        stride=stride,
        batch_size=batch_size,
        dtype="float32",
        device="cpu",
    )
    ids = load_tokenizer(folder)(text)["input_ids"]
    model = load_model(folder, dtype="float32").double()
    losses = []
    for begin, end, first in plan_windows(len(ids), 16, stride or 16):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
        losses += [-float(logits[token - begin - 1, ids[token]]) for token in range(first, end)]
    assert found.figures["num_tokens"] == len(losses)
    assert found.figures["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    low, high = found.figures["intervals"]["perplexity"]
    assert low < found.figures["perplexity"] < high


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    folder = save_tiny_model("llama", tmp_path / "model")
    with pytest.raises(UserError, match="stride 9 must lie between 1 and the window"):
        evaluate_perplexity(model=folder, data="x.txt", window=8, stride=9)
    with pytest.raises(UserError, match="holds conversations, not plain text"):
        evaluate_perplexity(model=folder, data=str(tmp_path / "chat.jsonl"))

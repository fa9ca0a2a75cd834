"""Perplexity of plain text by strided windows, the usual figure for e.g. wikitext-2."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regrow.checkpoint import CheckpointReader
from regrow.data.corpora import open_corpus
from regrow.errors import UserError
from regrow.evaluation.intervals import bootstrap_interval
from regrow.losses import divergence_metrics
from regrow.modeling.hidden import final_hidden, head_of
from regrow.modeling.load import load_model, load_tokenizer, pick_device
from regrow.progress import Progress
from regrow.types import EvalResult


def perplexity_settings(
    *,
    model: Path,
    data: str,
    split: str = "test",
    window: int = 2_048,
    stride: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
    **_: Any,
) -> dict[str, Any]:
    """Everything that the figure depends on."""
    text = _text(data, split)
    return {
        "sources": {"data": data, "split": split},
        "comparable": {
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "window": window,
            "stride": stride or window,
            "limit": limit,
        },
        "dtype": dtype,
        "device": pick_device(device).type,
        "model": CheckpointReader(model).fingerprint(),
    }


@torch.no_grad()
def evaluate_perplexity(
    *,
    model: Path,
    data: str,
    split: str = "test",
    window: int = 2_048,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
) -> EvalResult:
    """Perplexity of a text that is cut into windows; every token after the first is predicted once.

    Args:
        model: local folder.
        data: a text file (.txt, .raw, .md), taken as it is, or a corpus of plain texts, joined by blank
            lines.
        split: split of a Hub dataset.
        window: tokens that the model sees at once, cut to its context.
        stride: tokens by which windows advance; equal to `window` (the default) gives disjoint windows, whose
            first token is not predicted; smaller gives every token at least window - stride of context.
        limit: only the first `limit` tokens.
        batch_size: windows at a time.
        seed: of the interval's bootstrap (windows resampled whole).
        device, dtype: where and in what precision the model runs.
        trust_remote_code: run code that the checkpoint brings along.

    Raises:
        UserError: unusable text, model or stride.
    """
    stride = stride or window
    if not 1 <= stride <= window:
        raise UserError(f"stride {stride} must lie between 1 and the window of {window} tokens.")
    settings = perplexity_settings(
        model=model,
        data=data,
        split=split,
        window=window,
        stride=stride,
        limit=limit,
        device=device,
        dtype=dtype,
    )
    tokenizer = load_tokenizer(model, trust_remote_code)
    ids = tokenizer(_text(data, split), add_special_tokens=False, verbose=False)["input_ids"][:limit]
    if len(ids) < 2:
        raise UserError(f"{data} has fewer than two tokens; name a longer text.")
    network = load_model(model, dtype=dtype, device=pick_device(device), trust_remote_code=trust_remote_code)
    records = []
    windows = plan_windows(len(ids), window, stride)
    with Progress("perplexity", len(windows), "windows") as bar:
        for start in range(0, len(windows), batch_size):
            chosen = windows[start : start + batch_size]
            records += _window_sums(network, ids, chosen)
            bar.advance(len(chosen))
    sums = np.array([record["nll"] for record in records])
    counts = np.array([record["num_tokens"] for record in records])
    low, high = bootstrap_interval(sums, counts, seed=seed)
    figures = {
        "perplexity": math.exp(sums.sum() / counts.sum()),
        "num_tokens": int(counts.sum()),
        "intervals": {"perplexity": [math.exp(low), math.exp(high)]},
    }
    return EvalResult("perplexity", figures, records, settings)


def plan_windows(num_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (begin, end, first): tokens begin..end are seen, tokens first..end predicted and counted."""
    windows: list[tuple[int, int, int]] = []
    counted = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        first = max(begin + 1, counted)
        if first < end:
            windows.append((begin, end, first))
        counted = end
        if end == num_tokens:
            break
    return windows


def _window_sums(model: Any, ids: list[int], windows: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    head = head_of(model)
    device = head.weight_VD.device
    length = max(end - begin for begin, end, _ in windows)
    input_ids = torch.zeros(len(windows), length, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, (begin, end, _) in enumerate(windows):
        input_ids[row, : end - begin] = torch.tensor(ids[begin:end])
        mask[row, : end - begin] = 1
    hidden_BSD = final_hidden(model, input_ids.to(device), mask.to(device))
    records = []
    for row, (begin, end, first) in enumerate(windows):
        hidden_TD = hidden_BSD[row, first - begin - 1 : end - begin - 1]
        metrics = divergence_metrics(
            hidden_TD,
            hidden_TD,
            head.weight_VD,
            head.weight_VD,
            labels_T=torch.tensor(ids[first:end], device=device),
            student_bias=head.bias_V,
            teacher_bias=head.bias_V,
            student_softcap=head.softcap,
            teacher_softcap=head.softcap,
            student_scale=head.scale,
            teacher_scale=head.scale,
        )
        assert metrics.nll_student is not None
        nll = float(metrics.nll_student.double().sum())
        records.append({"begin": begin, "first": first, "num_tokens": end - first, "nll": nll})
    return records


def _text(data: str, split: str) -> str:
    path = Path(data).expanduser()
    if path.is_file() and path.suffix in (".txt", ".raw", ".md"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{data} is no readable UTF-8 text; convert it.") from None
    examples = open_corpus(data, split=split).examples
    texts = [example.text for example in examples if example.text is not None]
    if not texts:
        raise UserError(f"{data} holds conversations, not plain text; use the fidelity benchmark for those.")
    return "\n\n".join(texts)

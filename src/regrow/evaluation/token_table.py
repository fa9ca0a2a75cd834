"""Two models compared at every predicted token, and what that sums up to."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow.data.batches import pad_batch
from regrow.data.templates import Encoded
from regrow.evaluation.intervals import bootstrap_interval, bootstrap_quantile_interval
from regrow.losses import divergence_metrics
from regrow.modeling.hidden import Head, final_hidden, head_of
from regrow.progress import Progress
from regrow.types import Tokens


@dataclass(frozen=True)
class TokenTable:
    """One entry per predicted token [T], rows one after the other.

    Attributes:
        row: index of the row.
        response: the predicted token is the assistant's.
        kl: KL(teacher, student) in nats.
        top1: both models' most probable token is the same.
        top5: the teacher's most probable token is among the student's five.
        nll_student, nll_teacher: -log p of the token that follows, nats.
    """

    row: np.ndarray
    response: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    nll_student: np.ndarray
    nll_teacher: np.ndarray


@torch.no_grad()
def token_table(
    student: nn.Module,
    teacher: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    progress: str = "fidelity",
) -> TokenTable:
    """Run both models over the rows and compare them at every predicted token.

    Logits [tokens, vocabulary] are never held for more than the chunk that `divergence_metrics` works on.
    """
    heads = head_of(student), head_of(teacher)
    device = heads[0].weight_VD.device
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids), reverse=True)
    found: list[list[np.ndarray]] = []
    with Progress(progress, sum(len(row.input_ids) for row in rows), "tokens") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: value.to(device) for name, value in pad_batch([rows[i] for i in chosen]).items()}
            found.append(_compare_batch(student, teacher, heads, batch, torch.tensor(chosen, device=device)))
            bar.advance(int(batch["attention_mask"].sum()))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    by_row = np.argsort(columns[0], kind="stable")
    return TokenTable(*(column[by_row] for column in columns))


def _compare_batch(
    student: nn.Module,
    teacher: nn.Module,
    heads: tuple[Head, Head],
    batch: dict[str, Tensor],
    row_B: Tensor,
) -> list[np.ndarray]:
    ids_BS, mask_BS = batch["input_ids"], batch["attention_mask"]
    predicted = mask_BS[:, 1:].bool()  # right padding: a real token's predecessor is real
    hidden = [final_hidden(model, ids_BS, mask_BS)[:, :-1][predicted] for model in (student, teacher)]
    metrics = divergence_metrics(
        hidden[0],
        hidden[1],
        heads[0].weight_VD,
        heads[1].weight_VD,
        labels_T=ids_BS[:, 1:][predicted],
        student_bias=heads[0].bias_V,
        teacher_bias=heads[1].bias_V,
        student_softcap=heads[0].softcap,
        teacher_softcap=heads[1].softcap,
        student_scale=heads[0].scale,
        teacher_scale=heads[1].scale,
    )
    assert metrics.nll_student is not None
    assert metrics.nll_teacher is not None
    columns: Iterable[Tensor] = (
        row_B[:, None].expand_as(predicted)[predicted],
        batch["response_mask"][:, 1:][predicted],
        metrics.kl,
        metrics.top1,
        metrics.top5,
        metrics.nll_student,
        metrics.nll_teacher,
    )
    return [column.cpu().numpy() for column in columns]


def table_figures(table: TokenTable, tokens: Tokens, *, seed: int = 0) -> dict[str, Any]:
    """Figures over one of the two sets of tokens; `{"num_tokens": 0}` where the set is empty."""
    chosen = table.response if tokens == "response" else np.ones_like(table.response)
    num_tokens = int(chosen.sum())
    if num_tokens == 0:
        return {"num_tokens": 0}
    _, rows = np.unique(table.row[chosen], return_inverse=True)
    counts = np.bincount(rows).astype(np.float64)
    figures: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    measured = {
        "top1_agreement": table.top1,
        "top5_agreement": table.top5,
        "kl_mean": table.kl,
        "student_perplexity": table.nll_student,
        "teacher_perplexity": table.nll_teacher,
    }
    for name, values in measured.items():
        sums = np.bincount(rows, weights=values[chosen].astype(np.float64))
        interval = bootstrap_interval(sums, counts, seed=seed)
        finish = _perplexity if name.endswith("perplexity") else float
        figures[name] = finish(sums.sum() / num_tokens)
        intervals[name] = [finish(bound) for bound in interval]
    kl = table.kl[chosen].astype(np.float64)
    figures["kl_p95"] = float(np.quantile(kl, 0.95))
    intervals["kl_p95"] = list(bootstrap_quantile_interval(kl, rows, 0.95, seed=seed))
    return {**figures, "num_tokens": num_tokens, "num_rows": len(counts), "intervals": intervals}


def row_records(table: TokenTable) -> list[dict[str, Any]]:
    """Per row: sums over all predicted tokens, and over the assistant's under `response`."""
    records = []
    for row in np.unique(table.row):
        here = table.row == row
        records.append(
            {"row": int(row), **_sums(table, here), "response": _sums(table, here & table.response)}
        )
    return records


def _sums(table: TokenTable, chosen: np.ndarray) -> dict[str, Any]:
    return {
        "num_tokens": int(chosen.sum()),
        "top1": int(table.top1[chosen].sum()),
        "top5": int(table.top5[chosen].sum()),
        "kl": float(table.kl[chosen].sum(dtype=np.float64)),
        "nll_student": float(table.nll_student[chosen].sum(dtype=np.float64)),
        "nll_teacher": float(table.nll_teacher[chosen].sum(dtype=np.float64)),
    }


def _perplexity(nll: float) -> float:
    # A broken model's perplexity may overflow; JSON has no infinity, and the figure stays a lower bound.
    return math.exp(min(float(nll), 700.0))

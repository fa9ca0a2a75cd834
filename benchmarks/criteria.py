"""Every criterion, with and without refit, on a real model: agreement, KL and perplexity on held-out text.

The last untrained row of a width is the whole recipe: `obs_fisher` and the refit, calibrated sequentially,
each layer behind the pruned ones (`sequential` in the row).

    python benchmarks/criteria.py --width 1280 --untrained          # one width, no training: about 20 minutes
    python benchmarks/criteria.py                                   # three widths and a short distillation

Everything goes through the product: `calibrate` counts, `prune` writes a checkpoint, which is loaded again
and measured. The last line on standard output is JSON; its `rows` hold criterion, refit, width,
trained_tokens, agreement, kl, perplexity.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.data.batches import pad_batch, plan_batches
from regrow.data.blend import encode_corpora
from regrow.losses.metrics import divergence_metrics
from regrow.modeling.hidden import Head, final_hidden, head_of
from regrow.modeling.load import load_model, load_tokenizer
from regrow.modeling.sources import resolve_model
from regrow.progress import say
from regrow.pruning.calibrate import calibrate
from regrow.pruning.criteria import CRITERIA
from regrow.pruning.prune import prune

# Counted after the short distillation besides plain Wanda: the best three before it, whichever they are.
_NUM_TRAINED = 3
_BEST = "obs_fisher"


class HeldOut:
    """Held-out rows with the teacher's hidden states, so that the teacher runs once."""

    def __init__(self, teacher: Path, source: str, num_tokens: int, length: int, count: str) -> None:
        tokenizer = load_tokenizer(teacher)
        rows = encode_corpora(tokenizer, [(source, "train", 1.0, None)], max_length=length).rows
        chosen, total = [], 0
        for row in rows:
            if total >= num_tokens:
                break
            chosen.append(row)
            total += len(row.input_ids)
        plan = plan_batches([len(row.input_ids) for row in chosen], batch_tokens=4096, seed=0, epoch=0)
        self.num_rows, self.batches = len(chosen), [pad_batch([chosen[i] for i in batch]) for batch in plan]
        self.count = count
        self.labels = [self._labels(batch) for batch in self.batches]
        self.num_tokens = sum(int((labels != -100).sum()) for labels in self.labels)
        model: Any = load_model(teacher)
        self.head: Head = head_of(model)
        self.hidden = [self._run(model, index) for index in range(len(self.batches))]

    def _labels(self, batch: dict[str, Tensor]) -> Tensor:
        """The token after each position [B, S]; -100 where there is none or it is not counted."""
        labels = torch.full_like(batch["input_ids"], -100)
        real = batch["attention_mask"][:, 1:].bool()
        if self.count == "response":
            real &= batch["response_mask"][:, 1:]
        labels[:, :-1] = torch.where(real, batch["input_ids"][:, 1:], -100)
        return labels

    @torch.no_grad()
    def _run(self, model: Any, index: int) -> Tensor:
        batch = self.batches[index]
        hidden = final_hidden(model, batch["input_ids"], batch["attention_mask"])
        return hidden[self.labels[index] != -100]

    def measure(self, folder: Path) -> dict[str, float]:
        """Agreement, KL and perplexity of a student."""
        model: Any = load_model(folder)
        head = head_of(model)
        kl, agreement, nll, nll_teacher = 0.0, 0.0, 0.0, 0.0
        for index, labels in enumerate(self.labels):
            metrics = divergence_metrics(
                self._run(model, index),
                self.hidden[index],
                head.weight_VD.detach(),
                self.head.weight_VD.detach(),
                labels_T=labels[labels != -100],
                student_scale=head.scale,
                teacher_scale=self.head.scale,
                student_softcap=head.softcap,
                teacher_softcap=self.head.softcap,
            )
            assert metrics.nll_student is not None
            assert metrics.nll_teacher is not None
            kl += float(metrics.kl.double().sum())
            agreement += float(metrics.top1.double().sum())
            nll += float(metrics.nll_student.double().sum())
            nll_teacher += float(metrics.nll_teacher.double().sum())
        n = self.num_tokens
        self.teacher_perplexity = round(float(torch.tensor(nll_teacher / n).exp()), 4)
        return {
            "agreement": round(agreement / n, 4),
            "kl": round(kl / n, 4),
            "perplexity": round(float(torch.tensor(nll / n, dtype=torch.float64).exp()), 4),
        }


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    teacher = resolve_model(options.model)
    work = Path(options.work or tempfile.mkdtemp(prefix="criteria-"))
    work.mkdir(parents=True, exist_ok=True)
    statistics = work / "statistics.safetensors"
    criteria = options.criteria or list(CRITERIA)
    if not statistics.exists():
        _calibrate(
            teacher, statistics, options, fisher=any(CRITERIA[name].needs_gradients for name in criteria)
        )
    held_out = HeldOut(teacher, options.held_out, options.held_out_tokens, options.length, options.count)
    widths = [options.width] if options.width else [1408, 1280, 1024]
    rows: list[dict[str, Any]] = []
    for width in widths:
        for name in criteria:
            for refit in (False, True):
                folder = work / _name(_row(name, refit, width)) / "model"
                if not folder.exists():
                    prune(
                        model=teacher,
                        out=folder,
                        width=width,
                        criterion=name,
                        refit=refit,
                        statistics=statistics,
                    )
                row = _row(name, refit, width)
                rows.append(row | held_out.measure(folder))
                say(f"row {json.dumps(rows[-1])}")
        if _BEST in criteria:
            folder = _prune_sequentially(teacher, width, work, options)
            rows.append(_row(_BEST, True, width, sequential=True) | held_out.measure(folder))
            say(f"row {json.dumps(rows[-1])}")
    if not options.untrained:
        for width in widths:
            rows += _trained_rows(rows, width, teacher, held_out, work, options)
    _print_table(rows)
    if not options.work:
        shutil.rmtree(work)
    print(
        json.dumps(
            {
                "benchmark": "criteria",
                "model": options.model,
                "calibration": options.corpus,
                "calibration_tokens": options.tokens,
                "held_out": options.held_out,
                "held_out_tokens": held_out.num_tokens,
                "counted": options.count,
                "teacher_perplexity": held_out.teacher_perplexity,
                "seconds": round(time.monotonic() - started, 1),
                "rows": rows,
            }
        )
    )


def _row(criterion: str, refit: bool, width: int, sequential: bool = False) -> dict[str, Any]:
    row = {"criterion": criterion, "refit": refit, "sequential": sequential}
    return row | {"width": width, "trained_tokens": 0}


def _name(row: dict[str, Any]) -> str:
    how = "sequential" if row["sequential"] else "refit" if row["refit"] else "cut"
    return f"{row['criterion']}-{how}-{row['width']}"


def _calibrate(teacher: Path, out: Path, options: argparse.Namespace, **how: Any) -> None:
    calibrate(
        model=teacher,
        corpora=[(source, "train", 1.0, None) for source in options.corpus],
        out=out,
        num_tokens=options.tokens,
        sequence_length=options.length,
        device="cpu",
        **how,
    )


def _prune_sequentially(teacher: Path, width: int, work: Path, options: argparse.Namespace) -> Path:
    """The whole recipe, calibrated for this width."""
    folder = work / _name(_row(_BEST, True, width, sequential=True)) / "model"
    if folder.exists():
        return folder
    statistics = work / f"sequential-{width}.safetensors"
    if not statistics.exists():
        _calibrate(teacher, statistics, options, method="sequential", width=width, criterion=_BEST)
    prune(model=teacher, out=folder, width=width, criterion=_BEST, statistics=statistics)
    statistics.unlink()
    return folder


def _trained_rows(
    rows: list[dict[str, Any]],
    width: int,
    teacher: Path,
    held_out: HeldOut,
    work: Path,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The same short distillation of the best untrained students of a width, and of plain Wanda."""
    from regrow.training.distill import distill

    ranked = sorted((row for row in rows if row["width"] == width), key=lambda row: row["kl"])
    chosen = ranked[:_NUM_TRAINED]
    chosen += [
        row for row in ranked if row["criterion"] == "wanda" and not row["refit"] and row not in chosen
    ]
    trained = []
    for row in chosen:
        name = _name(row)
        out = work / f"{name}-trained" / "model"
        report = distill(
            student=work / name / "model",
            teacher=teacher,
            corpora=[(source, "train", 1.0, None) for source in options.corpus],
            held_out=(options.held_out, "train", 1.0, 32),
            out=out,
            work_dir=work / f"{name}-trained" / "work",
            max_steps=max(options.trained_tokens // 2048, 1),
            batch_tokens=2048,
            learning_rate=5e-5,
            sequence_length=options.length,
            device="cpu",
            seed=0,
        )
        trained.append(row | {"trained_tokens": report["num_tokens"]} | held_out.measure(out))
        say(f"row {json.dumps(trained[-1])}")
    return trained


def _print_table(rows: list[dict[str, Any]]) -> None:
    print("| width | criterion | refit | trained tokens | agreement | KL | perplexity |", file=sys.stderr)
    print("| --- | --- | --- | --- | --- | --- | --- |", file=sys.stderr)
    for row in rows:
        cells = [
            str(row["width"]),
            row["criterion"],
            "sequential" if row["sequential"] else "yes" if row["refit"] else "no",
            f"{row['trained_tokens']:,}",
            f"{row['agreement']:.3f}",
            f"{row['kl']:.3f}",
            f"{row['perplexity']:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="builtin:smollm2-135m-instruct")
    add("--corpus", nargs="+", default=["builtin:smollm2-chat"], help="calibration and distillation text")
    add("--held-out", default="builtin:smollm2-chat-heldout", help="text that neither sees")
    add("--width", type=int, help="only this width (default: 1408, 1280, 1024)")
    add("--criteria", nargs="+", choices=list(CRITERIA))
    add("--untrained", action="store_true", help="no distillation")
    add("--tokens", type=int, default=65_536, help="calibration tokens")
    add("--held-out-tokens", type=int, default=16_384)
    add("--trained-tokens", type=int, default=163_840)
    add("--count", choices=["all", "response"], default="response", help="which held-out tokens are judged")
    add("--length", type=int, default=512)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--work", help="folder for statistics and students; kept, and reused by a later call")
    return parser.parse_args()


if __name__ == "__main__":
    main()

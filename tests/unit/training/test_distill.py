"""Distillation from folder to folder on tiny models."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from regrow.data.blend import encode_corpora
from regrow.errors import RunError, UserError
from regrow.modeling.load import load_tokenizer
from regrow.training import trainer as trainer_module
from regrow.training.distill import distill
from regrow.training.record import what_is_wrong
from regrow.training.rows import plan_run
from regrow.training.teacher import LiveTeacher
from regrow.training.trainer import DistillTrainer
from training_case import QUICK, make_case, same_bytes, tensors_of, write_conversations


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"))


def naive_gradients(case, plan, tokens, loss, temperature, label_weight):
    """fp64 gradients of the mean divergence over all counted tokens of the planned rows, from full logits."""
    tokenizer = load_tokenizer(case["student"])
    rows = encode_corpora(tokenizer, case["corpora"], max_length=QUICK["sequence_length"], seed=0).rows
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(case[name], dtype=torch.float64)
        for name in ("student", "teacher")
    )
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number in (number for batch in plan for number in batch):
        row = rows[number]
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            q = (teacher(ids).logits[0] / temperature).log_softmax(-1)
        logits = student(ids).logits[0]
        p = (logits / temperature).log_softmax(-1)
        for t in range(len(row.input_ids) - 1):
            if tokens == "all" or row.response_mask[t + 1]:
                left, right = (q[t], p[t]) if loss == "forward_kl" else (p[t], q[t])
                total = total + (left.exp() * (left - right)).sum()
                total = total - label_weight * logits[t].log_softmax(-1)[row.input_ids[t + 1]]
                count += 1
    (total / count).backward()
    return float((total / count).detach()), {
        n: p.grad for n, p in student.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("tokens", "loss", "temperature", "label_weight"),
    [
        ("all", "forward_kl", 1.0, 0.0),
        ("response", "forward_kl", 2.0, 0.3),
        ("response", "reverse_kl", 1.0, 0.0),
    ],
)
def test_one_step_of_sgd_is_the_naive_gradient_over_the_union_of_accumulated_batches(
    case, tmp_path, tokens, loss, temperature, label_weight
):
    rate = 0.5
    report = distill(
        **case,
        out=tmp_path / "out",
        work_dir=tmp_path / "work",
        **QUICK
        | {
            "max_steps": 1,
            "gradient_accumulation_steps": 3,
            "precision": "fp32",
            "optimizer": "sgd",
            "learning_rate": rate,
            "warmup_fraction": 0.0,
            "max_grad_norm": 1e9,
            "select_by": "last",
            "tokens": tokens,
            "loss": loss,
            "temperature": temperature,
            "label_weight": label_weight,
        },
    )
    tokenizer = load_tokenizer(case["student"])
    corpus = encode_corpora(tokenizer, case["corpora"], max_length=QUICK["sequence_length"], seed=0)
    rows = corpus.rows
    plan = plan_run(corpus, batch_tokens=QUICK["batch_tokens"], seed=0, num_batches=3)
    # The batches must differ in their numbers of counted tokens, or a mean of means would pass.
    assert len({sum(sum(rows[n].response_mask[1:]) for n in batch) for batch in plan}) > 1
    value, gradients = naive_gradients(case, plan, tokens, loss, temperature, label_weight)
    assert report["losses"][0]["loss"] == pytest.approx(value, rel=1e-4)
    before, after = tensors_of(case["student"]), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    for name, old in before.items():
        if "embed_tokens" in name:
            assert same_bytes(old, after[name])
            continue
        moved = (old.double() - after[name].double()) / rate
        expected = gradients[name]
        assert torch.linalg.vector_norm(moved - expected) <= 2e-3 * torch.linalg.vector_norm(expected), name


def test_a_small_corpus_is_repeated_while_a_large_one_goes_on(tmp_path):
    case = make_case(tmp_path)
    small = tmp_path / "small.jsonl"
    lost = ("x" * 60, "never reached")  # beyond sequence_length
    write_conversations(small, [*((f"s{i}", "ba " * (1 + i)) for i in range(4)), lost])
    case["corpora"] = [*case["corpora"], (str(small), "train", 1.0, None)]
    found = {}
    for mode in ("live", "cached"):
        options = QUICK | {"max_steps": 8, "tokens": "response", "select_by": "last", "teacher_mode": mode}
        found[mode] = distill(**case, out=tmp_path / mode, work_dir=tmp_path / f"{mode}.w", **options)
    report = found["live"]
    large, small_again = report["corpora"]
    one_pass = next(note for note in report["notes"] if "one pass takes" in note)
    share = int(one_pass.split("one pass takes ")[1].split()[0])
    assert share < large["num_rows"] <= 30
    assert large["passes"] == 1
    assert small_again["num_rows"] == 4
    assert small_again["passes"] >= 2
    assert any("1 of 5 rows left out: no token of an answer" in note for note in report["notes"])
    assert found["cached"]["corpora"] == report["corpora"]
    assert found["cached"]["losses"][-1]["loss"] == pytest.approx(report["losses"][-1]["loss"], rel=1e-3)


def test_training_helps_and_the_report_says_what_happened(case, tmp_path):
    report = distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK)
    assert [entry["step"] for entry in report["held_out"]] == [0, 3, 6]
    first, last = report["held_out"][0], report["held_out"][-1]
    assert last["kl"] < 0.7 * first["kl"]
    assert last["top1_agreement"] > first["top1_agreement"]
    assert [entry["step"] for entry in report["losses"]] == [2, 4, 6]
    assert report["losses"][-1]["learning_rate"] < report["losses"][0]["learning_rate"]
    assert report["losses"][-1]["tokens"] == report["num_tokens"]
    assert 0 < report["num_response_tokens"] < report["num_loss_tokens"] < report["num_tokens"]
    assert report["steps"] == report["chosen_step"] == 6
    assert 0.5 < report["padding_efficiency"] <= 1
    assert report["tokens_per_s"] > 0
    assert report["peak_memory_bytes"] > 1e6
    assert report["hyperparameters"]["max_steps"] == 6
    assert report["trainable_parameters"] == sum(
        t.numel() for n, t in tensors_of(case["student"]).items() if "embed_tokens" not in n
    )
    json.dumps(report, allow_nan=False, default=str)
    assert any("last step, 6, the best" in note for note in report["notes"])


def test_result_keeps_everything_that_was_not_trained(tmp_path):
    """Qwen3.5: vision, multi-token prediction, F32 tensors, embedding; `train: mlp` leaves the rest too."""
    case = make_case(tmp_path, "qwen3_5", torch.bfloat16)
    report = distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", train="mlp", **QUICK)
    before, after = tensors_of(case["student"]), tensors_of(tmp_path / "out")
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert changed == {
        f"model.language_model.layers.{layer}.mlp.{part}_proj.weight"
        for layer in (0, 1)
        for part in ("gate", "up", "down")
    }
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    assert report["trainable_parameters"] == sum(before[name].numel() for name in changed)
    assert any("share" in note for note in report["notes"])
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (case["student"] / name).read_bytes()


def test_training_never_returns_a_worse_model(case, tmp_path):
    bad = QUICK | {"learning_rate": 0.3, "on_spike": "skip", "max_steps": 3, "eval_steps": 1}
    report = distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **bad)
    assert report["held_out"][-1]["kl"] > report["held_out"][0]["kl"]
    assert report["chosen_step"] == report["best_step"] == 0
    assert any("No step beat the untrained student" in note for note in report["notes"])
    before, after = tensors_of(case["student"]), tensors_of(tmp_path / "out")
    assert all(same_bytes(before[name], after[name]) for name in before)


def test_the_best_step_is_returned_not_the_last(case, tmp_path, monkeypatch):
    found = iter([0.5, 0.3, 0.4])

    def figures(totals):
        return {"kl": next(found), "top1_agreement": 0.5, "top5_agreement": 0.5}

    monkeypatch.setattr(trainer_module, "figures", figures)
    report = distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK)
    assert (report["best_step"], report["chosen_step"]) == (3, 3)
    best = load_file(tmp_path / "work" / "best-3.safetensors")
    after = tensors_of(tmp_path / "out")
    last = load_file(tmp_path / "work" / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in best.items())
    assert any(not torch.equal(last[name], value) for name, value in best.items())


def test_cached_teacher_gives_the_same_curve(case, tmp_path):
    settings = QUICK | {"precision": "bf16_mixed"}
    live = distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **settings)
    cached = distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", teacher_mode="cached", **settings)
    assert [e["loss"] for e in cached["losses"]] == pytest.approx(
        [e["loss"] for e in live["losses"]], rel=0.02
    )
    assert [e["kl"] for e in cached["held_out"]] == pytest.approx(
        [e["kl"] for e in live["held_out"]], rel=0.02
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "label_weight": 0.3}], ids=str)
def test_top_k_of_the_whole_vocabulary_gives_the_same_curve(case, tmp_path, options):
    settings = QUICK | {"precision": "fp32", "tokens": "response"} | options
    live = distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **settings)
    sparse = {"teacher_mode": "top_k", "teacher_entries": 5_000}
    stored = distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **settings | sparse)
    for curve, figure in (
        ("losses", "loss"), ("held_out", "kl"), ("held_out", "top1_agreement"), ("held_out", "top5_agreement")
    ):  # fmt: skip
        left, right = ([entry[figure] for entry in report[curve]] for report in (live, stored))
        assert right == pytest.approx(left, rel=1e-3), figure


@pytest.mark.parametrize("mode", ["live", "sampled"])
def test_an_estimated_loss_may_leap(case, tmp_path, monkeypatch, mode):
    """Estimates of a small KL from few draws are several times their median now and then."""
    histories = []

    def look(loss, grad_norm, recent):
        histories.append(len(recent))
        return what_is_wrong(loss, grad_norm, recent)

    monkeypatch.setattr("regrow.training.trainer.what_is_wrong", look)
    distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK, teacher_mode=mode)
    assert (max(histories) > 0) == (mode == "live")


@pytest.mark.parametrize("mode", ["top_k", "sampled"])
def test_a_few_entries_teach_nearly_as_much_and_the_report_says_so(case, tmp_path, mode):
    settings = QUICK | {"precision": "fp32"}
    live = distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **settings)
    sparse = {"teacher_mode": mode, "teacher_entries": 32}
    stored = distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **settings | sparse)
    first, last = stored["held_out"][0], stored["held_out"][-1]
    exact_first, exact_last = live["held_out"][0], live["held_out"][-1]
    # Before training the student is the same: agreement is exact, the KL a lower bound of the full one.
    assert (first["top1_agreement"], first["top5_agreement"]) == (
        exact_first["top1_agreement"],
        exact_first["top5_agreement"],
    )
    assert 0 < first["kl"] < exact_first["kl"]
    assert last["kl"] < 0.8 * first["kl"]
    assert last["top1_agreement"] == pytest.approx(exact_last["top1_agreement"], abs=0.1)
    about_corpus, about_held_out = (note for note in stored["notes"] if "256 bytes per token" in note)
    assert ("32 draws" if mode == "sampled" else "32 most likely tokens, and the rest as one") in about_corpus
    assert "held-out text" in about_held_out
    assert "32 most likely tokens, and the rest as one" in about_held_out
    assert "lower bound" in about_held_out


@pytest.mark.parametrize("mode", ["cached", "top_k", "sampled"])
def test_half_filled_stores_are_completed(case, tmp_path, monkeypatch, mode):
    """Killed while the teacher runs: what it has said is kept, and the result is that of one go."""
    settings = QUICK | {"teacher_mode": mode, "max_steps": 2}
    distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **settings)
    real, calls = LiveTeacher.targets, []

    def targets(self, batch):
        calls.append(batch.rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(LiveTeacher, "targets", targets)
    with pytest.raises(KeyboardInterrupt):
        distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **settings)
    distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **settings)
    assert not set(calls[0]) & set(calls[2])  # the corpus' store is the first to be filled
    left, right = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(same_bytes(left[name], right[name]) for name in left)


@pytest.mark.parametrize("entries", [8, 9])
def test_another_number_of_entries_is_another_run(case, tmp_path, entries):
    settings = QUICK | {"teacher_mode": "top_k", "max_steps": 1}
    work = tmp_path / "work"
    distill(**case, out=tmp_path / "a", work_dir=work, **settings, teacher_entries=8)
    if entries == 8:
        distill(**case, out=tmp_path / "b", work_dir=work, **settings, teacher_entries=entries)
    else:
        with pytest.raises(UserError, match="teacher_entries"):
            distill(**case, out=tmp_path / "b", work_dir=work, **settings, teacher_entries=entries)


@pytest.mark.parametrize("mode", ["cached", "top_k", "sampled"])
def test_full_stores_need_no_teacher(case, tmp_path, monkeypatch, mode):
    work = tmp_path / "work"
    settings = QUICK | {"teacher_mode": mode, "max_steps": 2}
    distill(**case, out=tmp_path / "a", work_dir=work, **settings)
    for path in [*work.glob("checkpoint-*/*"), *work.glob("checkpoint-*"), *work.glob("best-*")]:
        path.unlink() if path.is_file() else path.rmdir()
    from regrow.training import engine

    loaded = []
    real = engine.load_model
    monkeypatch.setattr(engine, "load_model", lambda folder, **k: loaded.append(folder) or real(folder, **k))
    distill(**case, out=tmp_path / "b", work_dir=work, **settings)
    assert loaded == [case["student"]]
    left, right = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(same_bytes(left[name], right[name]) for name in left)


@pytest.mark.parametrize("precision", ["bf16", "bf16_mixed"])
def test_gradient_checkpointing_changes_nothing(case, tmp_path, precision):
    settings = QUICK | {"precision": precision, "max_steps": 2}
    plain = distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **settings)
    less = distill(
        **case, out=tmp_path / "b", work_dir=tmp_path / "wb", gradient_checkpointing=True, **settings
    )
    assert [e["loss"] for e in less["losses"]] == [e["loss"] for e in plain["losses"]]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_remedy(case, tmp_path):
    settings = QUICK | {"learning_rate": 1e30, "warmup_fraction": 0.0, "eval_steps": 6, "save_steps": 1}
    with pytest.raises(RunError, match=r"stopped at step 2: .*lower learning_rate.*on_spike: skip"):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **settings)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "work" / "checkpoint-1" / "regrow.json").exists()


def poisoned(monkeypatch, steps):
    """Let the loss of some micro-batches (counted from 1) be NaN."""
    calls = iter(range(1, 1000))
    real = DistillTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        if next(calls) in steps:
            self._step_loss += math.nan
            return loss * math.nan
        return loss

    monkeypatch.setattr(DistillTrainer, "compute_loss", compute_loss)


def test_a_broken_step_is_skipped_where_asked(case, tmp_path, monkeypatch):
    poisoned(monkeypatch, {3})
    report = distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", on_spike="skip", **QUICK)
    assert [entry["step"] for entry in report["skipped_steps"]] == [3]
    assert all(math.isfinite(entry["loss"]) for entry in report["losses"])
    assert report["held_out"][-1]["kl"] < report["held_out"][0]["kl"]
    assert all(torch.isfinite(t).all() for t in tensors_of(tmp_path / "out").values())


def test_skipping_for_ever_stops(case, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(1, 100)))
    with pytest.raises(RunError, match="6 skipped steps in a row"):
        distill(
            **case,
            out=tmp_path / "out",
            work_dir=tmp_path / "work",
            on_spike="skip",
            **QUICK | {"max_steps": 20},
        )


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
)
def test_out_of_memory_says_what_to_change(case, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(DistillTrainer, "compute_loss", fail)
    with pytest.raises(RunError, match=r"halve batch_tokens \(192\).*gradient_checkpointing: true.*cached"):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kl"}, "loss is 'kl'"),
        ({"optimizer": "adamx"}, "adamx"),
        ({"report_to": ("nonsense",)}, "nonsense"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"train": "head"}, "train is 'head'"),
        ({"teacher_entries": 0}, "teacher_entries is 0"),
        ({"teacher_mode": "top_k", "loss": "jsd"}, "top_k.*loss jsd; set loss: forward_kl"),
        ({"teacher_mode": "sampled", "loss": "reverse_kl"}, "sampled.*set loss: forward_kl"),
        ({"teacher_mode": "sampled", "on_policy_fraction": 0.5}, "set teacher_mode: live"),
    ],
)
def test_bad_settings_are_refused(case, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **{**QUICK, **options})


def test_another_vocabulary_is_refused(case, tmp_path):
    other = make_case(tmp_path)["teacher"]
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:-8].contiguous()}, file, metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 280}))
    with pytest.raises(UserError, match="vocabularies differ"):
        distill(**case | {"teacher": other}, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK)


def test_finished_output_is_not_overwritten(case, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(UserError, match="already holds something"):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK)


def test_logs_reach_tensorboard(case, tmp_path):
    distill(
        **case,
        out=tmp_path / "out",
        work_dir=tmp_path / "work",
        **QUICK | {"report_to": ("tensorboard",), "max_steps": 2},
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "work" / "logs"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "eval/kl", "eval/top1_agreement"} <= set(
        events.Tags()["scalars"]
    )


def test_broken_weights_are_named(tmp_path):
    case = make_case(tmp_path)
    (file,) = case["student"].glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK)

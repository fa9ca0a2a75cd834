"""Fine-tuning and preference tuning through TRL: the losses are what they say, they learn, they merge."""

import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.data.blend import encode_corpora
from regrow.errors import UserError
from regrow.training import held_out, post_steps
from regrow.training.dpo import dpo, plan_pairs
from regrow.training.rows import plan_run
from regrow.training.sft import labels_of, sft
from training_case import make_case, preference_case, same_bytes, tensors_of, write_conversations
from vllm_stand_in import install_vllm

QUICK = {
    "max_steps": 3,
    "sequence_length": 48,
    "precision": "fp32",
    "report_to": (),
    "logging_steps": 1,
    "eval_steps": 3,
    "rank": 4,
    "alpha": 8,
    "learning_rate": 1e-2,
}


def encoded(case, length=48):
    tokenizer = AutoTokenizer.from_pretrained(case["student"])
    return encode_corpora(tokenizer, case["corpora"], max_length=length)


def naive_sums(folder, rows):
    """Sum of -log p over the response tokens, fp64, row by row without pads; and their number."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0].double()
        for position in range(1, len(row.input_ids)):
            if row.response_mask[position]:
                total -= logits[position - 1].log_softmax(-1)[row.input_ids[position]].item()
                count += 1
    return total, count


@pytest.mark.parametrize("accumulation", [1, 3])
def test_first_sft_loss_is_the_mean_over_the_steps_response_tokens(tmp_path, accumulation):
    case = make_case(tmp_path)
    options = QUICK | {"max_steps": 1, "gradient_accumulation_steps": accumulation}
    report = sft(**case, out=tmp_path / "out", work_dir=tmp_path / "work", batch_tokens=128, **options)
    corpus = encoded(case)
    rows = corpus.rows
    plan = plan_run(corpus, batch_tokens=128, seed=0, num_batches=accumulation)
    total, count = naive_sums(case["student"], [rows[row] for batch in plan for row in batch])
    assert report["losses"][0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert report["num_loss_tokens"] == count
    assert report["num_tokens"] == sum(len(rows[row].input_ids) for batch in plan for row in batch)


def test_sft_lowers_the_response_loss_and_leaves_the_rest_bit_identical(tmp_path, capsys):
    case = make_case(tmp_path, "qwen3_5", torch.bfloat16)
    options = QUICK | {"max_steps": 12, "precision": "bf16_mixed", "select_by": "last"}
    report = sft(
        **case, out=tmp_path / "out", work_dir=tmp_path / "w", targets=("gate_proj", "q_proj"), **options
    )
    assert capsys.readouterr().out == ""  # no prints of the trainer's
    before, after = tensors_of(case["student"]), tensors_of(tmp_path / "out")
    prefix = "model.language_model.layers"
    assert {name for name in before if not same_bytes(before[name], after[name])} == {
        f"{prefix}.0.mlp.gate_proj.weight",
        f"{prefix}.1.mlp.gate_proj.weight",
        f"{prefix}.1.self_attn.q_proj.weight",
    }
    rows = encoded(case).rows
    old, count = naive_sums(case["student"], rows)
    new, _ = naive_sums(tmp_path / "out", rows)
    assert new / count < 0.9 * old / count
    assert report["steps"] == report["chosen_step"] == 12
    assert report["trainable_parameters"] == 2 * 4 * (64 + 96) + 4 * (64 + 256)
    assert report["hyperparameters"]["tokens"] == "response"
    assert [entry["step"] for entry in report["held_out"]] == [0, 3, 6, 9, 12]


def test_sft_learns_from_finished_answers_that_follow_their_constraints(tmp_path):
    case = preference_case(tmp_path, 6)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[0]["messages"][1]["content"] = "no title"
    rows[1]["meta"] = rows[1]["meta"] | {"finished": False}
    rows[2].pop("meta")  # nothing that could be checked
    kinds = {"instruction_id_list": ["detectable_format:title", "punctuation:no_comma"], "kwargs": [{}, {}]}
    rows[3]["messages"][1]["content"] = "<<t, with a comma>>"
    rows[3]["meta"] = rows[3]["meta"] | kinds
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = sft(**case, out=tmp_path / "out", work_dir=tmp_path / "work", rows="followed", **QUICK)
    assert report["corpora"][0]["num_rows"] == 2
    assert any("2 of 6 rows are to be used" in note for note in report["notes"])
    assert (report["hyperparameters"]["rows"], report["hyperparameters"]["select_by"]) == ("followed", "last")
    assert report["chosen_step"] == 3


def test_sft_gives_back_the_weights_before_it_where_held_out_kl_only_rose(tmp_path):
    case = make_case(tmp_path)
    case["student"] = case["teacher"]
    report = sft(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK)
    assert report["chosen_step"] == 0
    assert "kept, unchanged" in report["notes"][-1]
    before, after = tensors_of(case["student"]), tensors_of(tmp_path / "out")
    assert all(same_bytes(before[name], after[name]) for name in before)


def test_best_adapters_are_those_that_are_merged(tmp_path, monkeypatch):
    case = make_case(tmp_path)
    real = []

    def figures(totals):
        """The held-out figures, but with step 2 as the best whatever was measured."""
        real.append(held_out.figures(totals))
        return real[-1] | {"kl": [1.0, 0.9, 0.5, 0.7][len(real) - 1]}

    monkeypatch.setattr(post_steps, "held_out_figures", figures)
    report = sft(**case, out=tmp_path / "a", work_dir=tmp_path / "w", **QUICK | {"eval_steps": 1})
    assert (report["chosen_step"], report["best_step"], report["steps"]) == (2, 2, 3)
    monkeypatch.undo()
    merged = case | {"student": tmp_path / "a"}
    again = sft(**merged, out=tmp_path / "b", work_dir=tmp_path / "v", **QUICK)
    assert again["held_out"][0]["kl"] == pytest.approx(real[2]["kl"], rel=1e-3)
    assert real[2]["kl"] != pytest.approx(real[3]["kl"], rel=2e-3)


DPO = QUICK | {
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_samples": 2,
    "min_pairs": 8,
    "rollout_tokens": 8,
}


def test_dpo_starts_at_ln_2_widens_the_margin_and_merges(tmp_path, capsys):
    case = preference_case(tmp_path)
    report = dpo(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **DPO | {"max_steps": 5})
    assert capsys.readouterr().out == ""
    first, last = report["losses"][0], report["losses"][-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == 0
    assert last["loss"] < math.log(2)
    assert last["margin"] > 0
    assert report["pairs"]["num_pairs"] == 12
    assert report["pairs"]["chosen_from"] == {"student": 0, "teacher": 12}
    assert report["trainable_parameters"] == make_trainable(report)
    assert report["chosen_step"] == 5
    # the merged model prefers the chosen answers more than the student did
    pairs = [json.loads(line) for line in (tmp_path / "work" / "pairs.jsonl").read_text().splitlines()]
    assert gap(tmp_path / "out", pairs) > gap(case["student"], pairs) + 1


def make_trainable(report):
    """LoRA of rank 4 on the seven projections of two layers with D 64, F 96, 4 heads, 2 key-value heads."""
    return 2 * 4 * (3 * (64 + 96) + 2 * (64 + 64) + 2 * (64 + 32))


def gap(folder, pairs):
    """Mean of log p(chosen) - log p(rejected)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total = 0.0
    for pair in pairs:
        for sign, answer in ((1, pair["chosen"]), (-1, pair["rejected"])):
            ids = pair["prompt_ids"] + answer["token_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            begin = len(pair["prompt_ids"])
            total += sign * sum(logs[i - 1, ids[i]].item() for i in range(begin, len(ids)))
    return total / len(pairs)


@pytest.mark.parametrize("precision", ["bf16_mixed", "bf16"])
def test_dpo_in_bf16_with_checkpointed_gradients_starts_at_ln_2_too(tmp_path, precision):
    case = preference_case(tmp_path)
    options = DPO | {"precision": precision, "gradient_checkpointing": True, "report_to": ("tensorboard",)}
    report = dpo(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **options)
    assert report["losses"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert report["losses"][-1]["margin"] > 0
    assert list((tmp_path / "work" / "logs").iterdir())


def test_pairs_are_made_again_only_for_what_they_depend_on(tmp_path, monkeypatch):
    case = preference_case(tmp_path)

    def run(name, **options):
        dpo(**case, out=tmp_path / name, work_dir=tmp_path / f"w{name}", pairs_dir=kept, **DPO | options)
        return (tmp_path / f"w{name}" / "pairs.jsonl").read_text()

    kept = tmp_path / "kept"
    first = run("a")

    def never(*args, **kwargs):
        raise AssertionError("the student writes again")

    with monkeypatch.context() as patch:
        patch.setattr("regrow.training.writing.generate_responses", never)
        others = {"learning_rate": 1e-3, "beta": 0.2, "batch_size": 2, "max_steps": 2, "rank": 2}
        assert run("b", **others, rollout_batch_size=2, select_by="held_out_kl") == first
        assert len(list(kept.iterdir())) == 1
        changes = {"num_samples": 3, "rollout_temperature": 0.5, "seed": 1, "sequence_length": 40}
        for name, value in changes.items():
            with pytest.raises(AssertionError, match="writes again"):
                run(name, **{name: value})
    run("d", seed=1)
    assert len(list(kept.iterdir())) == 2
    run("e")  # the first ones are still there
    assert len(list(kept.iterdir())) == 2


def test_dpo_through_vllm_makes_the_same_pairs_and_ends_the_engine(tmp_path, monkeypatch):
    case = preference_case(tmp_path)
    vllm = install_vllm(monkeypatch)
    pairs = []
    for engine in ("transformers", "vllm"):
        work = tmp_path / f"work-{engine}"
        greedy = {"rollout_engine": engine, "rollout_temperature": 1e-6, "precision": "fp32"}
        report = dpo(**case, out=tmp_path / engine, work_dir=work, **DPO | greedy)
        assert report["hyperparameters"]["rollout_engine"] == engine
        pairs.append((work / "pairs.jsonl").read_text())
    assert pairs[0] == pairs[1]
    assert (len(vllm.started), vllm.running) == (1, 0)


def test_what_cannot_be_is_said_in_one_sentence(tmp_path, monkeypatch):
    case = make_case(tmp_path)
    folders = {"out": tmp_path / "out", "work_dir": tmp_path / "work"}
    with pytest.raises(UserError, match=r"no rows with verifiable constraints.*--constraint-share"):
        dpo(**case, **folders, **DPO)
    with pytest.raises(UserError, match="beta is 0"):
        dpo(**case, **folders, **DPO | {"beta": 0})
    with pytest.raises(UserError, match="0 of 30 rows are to be used"):
        sft(**case, **folders, **QUICK, rows="followed")
    with pytest.raises(UserError, match="rows is 'good'"):
        sft(**case, **folders, **QUICK, rows="good")
    with pytest.raises(UserError, match="dropout is 1"):
        sft(**case, **folders, **QUICK, dropout=1)
    with pytest.raises(UserError, match="trainer refuses"):
        sft(**case, **folders, **QUICK, optimizer="sgdd")
    preferences = preference_case(tmp_path, 5)
    with pytest.raises(UserError, match="5 preference pairs in 5 prompts"):
        dpo(**preferences, **folders, **DPO)
    monkeypatch.setitem(sys.modules, "trl", None)
    for function in (sft, dpo):
        with pytest.raises(UserError, match=r"pip install 'regrow\[post\]'") as caught:
            function(**case, **folders, **(QUICK if function is sft else DPO))
        assert "\n" not in str(caught.value)
    assert not folders["out"].exists()


def test_sft_leaves_out_rows_whose_answer_is_cut_off_whole(tmp_path):
    case = make_case(tmp_path)
    write_conversations(tmp_path / "train.jsonl", [("q", "ab " * 3), ("x" * 60, "never reached")])
    options = QUICK | {"max_steps": 1}
    report = sft(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **options)
    assert report["corpora"][0]["num_rows"] == 1
    assert any("1 of 2 rows left out: no token of an answer" in note for note in report["notes"])


def test_labels_are_the_response_and_batches_of_pairs_are_full(tmp_path):
    case = make_case(tmp_path)
    row = encoded(case).rows[0]
    labels = labels_of(row)
    assert labels[0] == -100
    assert [label != -100 for label in labels[1:]] == row.response_mask[1:]
    plan = plan_pairs(5, batch_size=3, seed=0, num_batches=10)
    assert {len(batch) for batch in plan} == {3}
    order = [row for batch in plan for row in batch]
    assert all(sorted(order[i * 5 : i * 5 + 5]) == list(range(5)) for i in range(6))
    assert plan_pairs(5, batch_size=3, seed=1, num_batches=10) != plan

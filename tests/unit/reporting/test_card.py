"""The card: sections of the Hub's template, filled from the record or absent; its snippet runs."""

import importlib.resources
import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from regrow.reporting.card import get_started
from regrow.reporting.facts import read_facts
from regrow.reporting.report import write_report
from tiny_models import save_tiny_model
from unit.reporting.fixture import full_results, only_pruned, without


def headings(markdown):
    """Level and title of every heading outside code."""
    tokens = MarkdownIt("commonmark").parse(ModelCard(markdown).text)
    return [
        (int(token.tag[1]), tokens[place + 1].content)
        for place, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def template_headings():
    text = (importlib.resources.files("huggingface_hub") / "templates" / "modelcard_template.md").read_text()
    found = re.findall(r"^(#+) (.*)$", text.split("---", 2)[2], flags=re.MULTILINE)
    return [(len(marks), title.replace(" [optional]", "")) for marks, title in found]


def in_order(part, whole):
    rest = iter(whole)
    return all(item in rest for item in part)


@pytest.mark.parametrize("results", [full_results(), only_pruned(), {}])
def test_headings_are_the_hub_templates_in_its_order(make_run, results):
    _, card, _ = make_run(results)
    first, *rest = headings(card)
    assert first[0] == 1
    assert first[1].startswith("Model Card for ")
    assert in_order(rest, template_headings()[1:]), rest


def test_a_full_run_fills_nearly_every_section(full_run):
    _, card, _ = full_run
    missing = {title for _, title in template_headings()[1:]} - {title for _, title in headings(card)}
    # Sources and a contact are nothing that a run records.
    assert missing == {"Model Sources", "Model Card Contact"}


@pytest.mark.parametrize("results", [full_results(), only_pruned(), {}])
def test_nothing_is_left_to_be_filled_in(make_run, results):
    _, card, page = make_run(results)
    for text in (card, page):
        assert "nformation needed" not in text.lower()
        assert not re.search(r"\bNone\b|\bnan\b|\binf\b|\{\{ |\{%", text)


def test_figures_of_the_record_appear_with_their_intervals(full_run):
    _, card, _ = full_run
    for figure in (
        "134,515,008",
        "121,243,968",
        "86.8 % [86.2, 87.4]",  # held-out agreement of the final model
        "0.104 [0.0978, 0.111]",  # its KL
        "30.6 % [27.1, 34.2]",  # the teacher's instruction-level accuracy, 255/834
        "29.0 % [25.5, 32.6]",  # the final model's, 242/834
        "\u22121.6 points (95 % interval \u22123.9 to +0.8, prompts resampled)",
        "not enough data",
        "Prompts lost 31, gained 22 (McNemar p = 0.21)",
        "About 11,204 prompts would settle it",
        "62 tensors of the published files equal the parent's",
        "greedy decoding, at most 512 new tokens, checkers of lm-eval 0.4.13, in bfloat16 on cpu",
        "vllm_speculative: no, the model has no multi-token-prediction head.",
        "distill, recover: 3 rows of the corpus left out",
        "1 h 08 min",
        "65,536",
        "layers.29",
        "4.71 % after the cut, 1.81 % after the refit",
    ):
        assert figure in card, figure


@pytest.mark.parametrize(
    ("benchmark", "gone", "said"),
    [
        ("ifeval", ("IFEval", "18.7 %", "30.6 %", "zhou2023ifeval"), "Not measured: instruction following,"),
        ("fidelity", ("86.8 %", "0.104", "Perplexity"), "Not measured: agreement with the teacher,"),
        ("latency", ("Decode (", "21.9"), "Not measured: speed,"),
    ],
)
def test_a_benchmark_that_was_not_run_leaves_no_figure_and_is_named(make_run, benchmark, gone, said):
    results = without(full_results(), benchmark)
    if benchmark == "ifeval":
        del results["stages"]["evaluate"]["report"]["comparison"]
        results["recipe"]["evaluate"]["benchmarks"].remove("ifeval")
        del results["recipe"]["synthesize"]  # its prompts were kept apart from IFEval's
    if benchmark == "fidelity":
        for stage in ("distill", "recover"):
            results["stages"][stage]["report"]["held_out"] = []
    _, card, page = make_run(results)
    for words in gone:
        assert words not in card
        assert words not in re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert said in card


def test_sampled_repeats_are_said_and_count_each_prompt_once(make_run):
    results = full_results()
    for name in ("teacher", results["final"]):
        ifeval = results["models"][name]["ifeval"]
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "repeats": 4}
        ifeval["settings"]["comparable"] |= sampling
        counted = [value for value in ifeval.values() if isinstance(value, dict) and "total" in value]
        for value in [*counted, *(kind["strict"] for kind in ifeval["by_type"].values())]:
            value["correct"], value["total"] = 4 * value["correct"], 4 * value["total"]
    _, card, _ = make_run(results)
    assert "IFEval: 541 prompts from" in card
    assert "4 sampled answers to each at temperature 0.7 and top-p 1, at most 512 new tokens" in card
    assert "Strict; means of 4 answers to each prompt." in card
    assert "Wilson" not in card


def test_text_that_the_parent_wrote_is_described_and_told_apart(make_run):
    results = full_results()
    outs = ["/home/ada/text/chat", "/home/ada/text/followed"]
    results["recipe"]["synthesize"] = [
        {
            "out": outs[0],
            "num_prompts": 40_000,
            "constraint_share": 0.25,
            "prompts": "p.txt",
            "num_self_prompts": 70,
        },
        {"out": outs[1], "num_prompts": 9_000, "constraint_share": 1.0, "attempts": 4, "violations": "drop"},
    ]
    names = [f"{out}/train.jsonl" for out in outs]
    results["recipe"]["corpora"] = [{"source": name, "split": "train", "weight": 1.0} for name in names]
    results["recipe"]["held_out"] = {"source": f"{outs[0]}/held_out.jsonl", "split": "train"}
    for report in (results["stages"][stage]["report"] for stage in ("calibrate", "distill", "recover")):
        local = report is results["stages"]["calibrate"]["report"]
        report["corpora"] = [
            {"source": "train.jsonl" if local else name, "split": "train", "num_rows": rows, "num_tokens": 7}
            for name, rows in zip(names, (3_111, 222), strict=True)
        ]
    _, card, page = make_run(results)
    assert "/home/ada" not in card + page
    lines = [line for line in card.splitlines() if line.startswith("|") and "train.jsonl" in line]
    assert [line.split("|")[1].strip() for line in lines] == ["chat/train.jsonl", "followed/train.jsonl"]
    assert "3,111" in lines[0]
    assert "222" in lines[1]
    assert (
        "- chat: the parent's own answers to up to 40,000 prompts from a file and 70 that it wrote itself. "
        "Left out:" in card
    )
    assert (
        "- followed: the parent's own answers to 9,000 prompts, 100.0 % of them with constraints that a "
        "program checks (the best of up to 4 tries; answers that miss one are left out)." in card
    )


def test_a_run_that_only_pruned_claims_no_training(make_run):
    _, card, page = make_run(only_pruned())
    for text in (card, page):
        assert not re.search("distill|lora|recover|refit", text, flags=re.IGNORECASE)
    assert "from 1,536 to 1,280 channels" in card


def test_what_was_counted_behind_pruned_layers_is_not_called_the_parents(make_run):
    results = full_results()
    _, card, _ = make_run(results)
    assert "channel statistics of the parent" in card
    results["recipe"]["calibrate"]["method"] = "sequential"
    _, card, _ = make_run(results)
    assert "behind the layers pruned before it" in card
    assert "toward the parent's residual stream" in card
    assert "channel statistics of the parent" not in card


def test_training_that_helped_nothing_is_not_called_distillation(make_run):
    results = full_results()
    for stage in ("distill", "recover"):
        results["stages"][stage]["report"]["chosen_step"] = 0
    _, card, _ = make_run(results)
    data = ModelCard(card).data.to_dict()
    assert "base_model_relation" not in data
    assert "lora" not in data["tags"]
    assert "then distilled" not in card
    assert card.count("no step beat the untrained weights, which were kept unchanged") == 2


def test_somebodys_folders_are_not_published(make_run):
    results = full_results()
    results["recipe"]["model"] = "/home/ada/models/SmolLM2"
    results["recipe"]["corpora"][0]["source"] = "/home/ada/data/chat.jsonl"
    results["recipe"]["held_out"]["source"] = "../secret/held.jsonl"
    results["notes"] = ["calibrate: /home/ada/data/chat.jsonl: 3 rows left out."]
    results["parent_card"].pop("model_id")
    _, card, page = make_run(results)
    for text in (card, page):
        assert "/home" not in text
        assert "secret" not in text
        assert "chat.jsonl" in text
    assert "base_model" not in ModelCard(card).data.to_dict().get("base_model", {})


def test_same_results_same_bytes(full_run):
    run_dir, card, page = full_run
    code = "import sys, pathlib; from regrow.reporting.report import write_report; " + (
        "write_report(run_dir=pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, env=environment)
    assert (run_dir / "model" / "README.md").read_text() == card
    assert (run_dir / "report.html").read_text() == page


def test_written_files_are_named(full_run):
    run_dir, _, _ = full_run
    assert write_report(run_dir=run_dir) == {"notes": [], "card": "model/README.md", "page": "report.html"}
    leftovers = [path.name for path in run_dir.rglob(".*")]
    assert leftovers == []


def test_a_parent_without_licence_is_said(make_run):
    results = full_results()
    results["parent_card"] = {}
    run_dir, card, _ = make_run(results)
    assert "licence" in write_report(run_dir=run_dir)["notes"][0]
    assert "license" not in ModelCard(card).data.to_dict()
    assert "apache" not in card


@pytest.mark.parametrize("thinking", [None, False])
def test_the_snippet_runs_as_it_stands(tmp_path, thinking, capsys, monkeypatch):
    save_tiny_model("llama", tmp_path)
    facts = read_facts({"recipe": {"name": "tiny", "enable_thinking": thinking}}, tmp_path)
    code = get_started(facts)
    assert "apply_chat_template" in code
    assert ("enable_thinking=False" in code) == (thinking is False)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_the_snippet_of_a_model_without_chat_template_runs(tmp_path, monkeypatch):
    save_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    code = get_started(read_facts({}, tmp_path))
    assert "apply_chat_template" not in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {})


def test_the_snippet_names_the_published_model():
    results = full_results()
    results["recipe"]["report"]["model_id"] = "ada/small"
    assert 'source = "ada/small"\n' in get_started(read_facts(results))
    results["recipe"]["report"]["model_id"] = 'x"; import os; "'
    assert "import os" not in get_started(read_facts(results))

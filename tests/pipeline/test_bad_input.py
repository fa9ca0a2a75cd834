"""What careless users type: one sentence, the right exit code, no traceback, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from regrow.cli import main
from tiny_models import save_tiny_model, tiny_model

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]}
    for n in range(12)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a good model, spoilt copies of it, and good and spoilt texts."""
    root = tmp_path_factory.mktemp("world")
    save_tiny_model("llama", root / "model")
    spoil_models(root)
    spoil_texts(root)
    return root


def spoil_models(root):
    good = root / "model"

    def copy(name, **config):
        folder = root / name
        shutil.copytree(good, folder)
        settings = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    tiny_model("llama").save_pretrained(root / "sharded", max_shard_size="100KB")
    for name in ("missing_shard", "cut_shard", "outside", "bad_index"):
        shutil.copytree(root / "sharded", root / name)
    shard = sorted((root / "sharded").glob("*.safetensors"))[0].name
    (root / "missing_shard" / shard).unlink()
    data = (root / "cut_shard" / shard).read_bytes()
    (root / "cut_shard" / shard).write_bytes(data[: len(data) // 2])
    index = root / "outside" / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"] = dict.fromkeys(text["weight_map"], f"../model/{shard}")
    index.write_text(json.dumps(text))
    (root / "bad_index" / "model.safetensors.index.json").write_text("{")

    copy("quantised", quantization_config={"quant_method": "gptq", "bits": 4})
    copy("unsupported", model_type="mamba2", architectures=["Mamba2ForCausalLM"])
    copy("no_type").joinpath("config.json").write_text("{}")
    copy("no_config").joinpath("config.json").unlink()
    (copy("garbage") / "model.safetensors").write_bytes(b"\xff" * 400)
    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    sick = copy("sick") / "model.safetensors"
    tensors = load_file(sick)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, sick, metadata={"format": "pt"})
    (root / "empty_folder").mkdir()
    words = copy("other_words", vocab_size=256, pad_token_id=0, eos_token_id=0) / "model.safetensors"
    tensors = load_file(words)
    tensors = {n: t[:256].clone() if "embed" in n or "lm_head" in n else t for n, t in tensors.items()}
    save_file(tensors, words, metadata={"format": "pt"})


def spoil_texts(root):
    def lines(name, rows):
        (root / name).write_text("\n".join(json.dumps(row) for row in rows))

    lines("good.jsonl", ROWS)
    lines("useless.jsonl", [{"title": "no text here"}] * 3)
    lines("empty_answers.jsonl", [{"instruction": "x", "input": "", "output": ""}] * 3)
    (root / "empty.jsonl").write_text("")
    (root / "torn.jsonl").write_text(json.dumps(ROWS[0]) + "\n{not json\n")
    (root / "latin.jsonl").write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
    prompt = {"key": 1, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    lines("prompts.jsonl", [prompt])
    lines("odd_prompts.jsonl", [prompt | {"instruction_id_list": ["punctuation:no_vowels"]}])
    lines("answers.jsonl", [{"prompt": "Say it.", "response": "It."}])
    lines("stray_answers.jsonl", [{"prompt": "Something else.", "response": "It."}])
    (root / "torn_answers.jsonl").write_text("{")
    recipe = {
        "name": "tiny",
        "model": str(root / "model"),
        "corpora": [{"source": str(root / "good.jsonl")}],
        "held_out": {"source": str(root / "good.jsonl")},
        "prune": {"width": 64, "step": 32, "criterion": "magnitude", "refit": False},
    }
    variants = {
        "good": {},
        "unknown_key": {"prunee": {}},
        "unknown_inner_key": {"prune": {"width": 64, "step": 32, "heads": 3}},
        "no_multiple": {"prune": {"width": 65, "step": 32}},
        "too_wide": {"prune": {"width": 4096, "step": 32, "criterion": "magnitude", "refit": False}},
        "no_width": {"prune": {"step": 32}},
        "negative": {"distill": {"max_steps": -1}},
        "odd_criterion": {"prune": {"width": 64, "step": 32, "criterion": "vibes", "refit": False}},
        "no_model": {"model": str(root / "nowhere")},
        "no_corpus": {"corpora": [{"source": str(root / "nowhere.jsonl")}]},
        "no_rows": {"corpora": [{"source": str(root / "useless.jsonl")}]},
        "bad_name": {"name": "../../etc"},
    }
    for name, change in variants.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe | change))
    (root / "torn.yaml").write_text("name: [")
    (root / "list.yaml").write_text("- a\n- b\n")
    (root / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    other = root / "other_run"
    other.mkdir()
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"name": "other"}))
    (root / "full").mkdir()
    (root / "full" / "thesis.txt").write_text("keep me")
    (root / "file").write_text("keep me")


# name: (arguments; {w} is the world's folder and {o} a new path, exit code, words that must be said)
CASES = {
    "recipe that is not there": ("run {w}/nowhere.yaml --out {o}", 2, "nowhere.yaml"),
    "recipe that is a folder": ("run {w}/full --out {o}", 2, "full"),
    "recipe that is no YAML": ("run {w}/torn.yaml --out {o}", 2, "torn.yaml"),
    "recipe that is a list": ("run {w}/list.yaml --out {o}", 2, "list.yaml"),
    "recipe in another encoding": ("run {w}/latin.yaml --out {o}", 2, "latin.yaml"),
    "unknown key": ("run {w}/unknown_key.yaml --out {o}", 2, "prunee"),
    "unknown key in a section": ("run {w}/unknown_inner_key.yaml --out {o}", 2, "prune.heads"),
    "name with a path in it": ("run {w}/bad_name.yaml", 2, "name"),
    "width no multiple of the step": ("run {w}/no_multiple.yaml --out {o}", 2, "65"),
    "width above the model's": ("run {w}/too_wide.yaml --out {o}", 2, "4096"),
    "width left out": ("run {w}/no_width.yaml --out {o}", 2, "prune.width"),
    "negative steps": ("run {w}/negative.yaml --out {o}", 2, "distill.max_steps"),
    "unknown criterion": ("run {w}/odd_criterion.yaml --out {o}", 2, "vibes"),
    "model that is not there": ("run {w}/no_model.yaml --out {o}", 2, "nowhere"),
    "corpus that is not there": ("run {w}/no_corpus.yaml --out {o}", 2, "nowhere.jsonl"),
    "corpus without usable rows": ("run {w}/no_rows.yaml --out {o}", 2, "useless.jsonl"),
    "dry run of a bad recipe": ("run {w}/no_rows.yaml --out {o} --dry-run", 2, "useless.jsonl"),
    "dry run of a width too wide": ("run {w}/too_wide.yaml --out {o} --dry-run", 2, "4096"),
    "override without a value": ("run {w}/good.yaml --out {o} --set prune.width", 2, "prune.width"),
    "override of an unknown key": ("run {w}/good.yaml --out {o} --set prune.with=64", 2, "prune.with"),
    "override of the wrong kind": ("run {w}/good.yaml --out {o} --set prune.width=wide", 2, "prune.width"),
    "stage that does not exist": ("run {w}/good.yaml --out {o} --from bake", 2, "bake"),
    "stages the wrong way round": ("run {w}/good.yaml --out {o} --from report --until prune", 2, "report"),
    "run folder of another run": ("run {w}/good.yaml --out {w}/other_run", 2, "other"),
    "run folder with other things": ("run {w}/good.yaml --out {w}/full", 2, "full"),
    "run folder that is a file": ("run {w}/good.yaml --out {w}/file", 2, "file"),
    "model folder without weights": ("inspect {w}/empty_folder", 2, "empty_folder"),
    "no such model": ("inspect {w}/nowhere", 2, "nowhere"),
    "width above the model's, inspected": ("inspect {w}/model --width 4096", 2, "4096"),
    "config without a type": ("inspect {w}/no_type", 2, "config.json"),
    "unsupported architecture": ("inspect {w}/unsupported", 2, "mamba2"),
    "quantised checkpoint": ("inspect {w}/quantised", 2, "quanti"),
    "pruning a quantised checkpoint": ("prune {w}/quantised --width 32 --step 32 --out {o}", 2, "quanti"),
    "pruning without a config": ("prune {w}/no_config --width 32 --step 32 --out {o}", 2, "config.json"),
    "missing shard": ("prune {w}/missing_shard --width 32 --step 32 --out {o}", 2, "safetensors"),
    "truncated shard": ("prune {w}/cut_shard --width 32 --step 32 --out {o}", 2, "safetensors"),
    "index that leaves the folder": ("prune {w}/outside --width 32 --step 32 --out {o}", 2, "outside"),
    "index that is no JSON": ("prune {w}/bad_index --width 32 --step 32 --out {o}", 2, "index"),
    "shard of noise": ("prune {w}/garbage --width 32 --step 32 --out {o}", 2, "model.safetensors"),
    "pickle instead of safetensors": ("prune {w}/pickled --width 32 --step 32 --out {o}", 2, "safetensors"),
    "width no multiple, pruned": ("prune {w}/model --width 33 --step 32 --out {o}", 2, "33"),
    "output that exists": ("prune {w}/model --width 32 --step 32 --out {w}/full", 2, "full"),
    "output below a file": ("prune {w}/model --width 32 --step 32 --out {w}/file/x", 2, "file"),
    "criterion without its statistics": (
        "prune {w}/model --width 32 --step 32 --criterion wanda --out {o}",
        2,
        "calibrate",
    ),
    "refit without statistics": ("prune {w}/model --width 32 --step 32 --refit --out {o}", 2, "calibrate"),
    "statistics that are none": (
        "prune {w}/model --width 32 --step 32 --criterion wanda --statistics {w}/good.jsonl --out {o}",
        2,
        "good.jsonl",
    ),
    "plan that is none": (
        "prune {w}/model --width 32 --step 32 --plan {w}/good.yaml --out {o}",
        2,
        "good.yaml",
    ),
    "shards and sizes at once": (
        "prune {w}/model --width 32 --step 32 --shards 2 --max-shard-size 1MB --out {o}",
        2,
        "shard",
    ),
    "more shards than tensors": (
        "prune {w}/model --width 32 --step 32 --shards 5000 --out {o}",
        2,
        "5000",
    ),
    "shard size of no unit": (
        "prune {w}/model --width 32 --step 32 --max-shard-size big --out {o}",
        2,
        "big",
    ),
    "empty corpus": ("calibrate {w}/model --corpus {w}/empty.jsonl --out {o}", 2, "empty.jsonl"),
    "torn corpus": ("calibrate {w}/model --corpus {w}/torn.jsonl --out {o}", 2, "corpus"),
    "corpus in another encoding": (
        "calibrate {w}/model --corpus {w}/latin.jsonl --out {o}",
        2,
        "latin.jsonl",
    ),
    "corpus that is nowhere": ("calibrate {w}/model --corpus {w}/nowhere.jsonl --out {o}", 2, "nowhere"),
    "corpus of empty answers": (
        "calibrate {w}/model --corpus {w}/empty_answers.jsonl --out {o}",
        2,
        "empty_answers.jsonl",
    ),
    "model with NaN weights": (
        "calibrate {w}/sick --corpus {w}/good.jsonl --device cpu --out {o}",
        1,
        "layers.0",
    ),
    "merging what is no statistics": (
        "merge-statistics {w}/good.jsonl {w}/good.jsonl --out {o}",
        2,
        "good.jsonl",
    ),
    "distilling with an unknown setting": (
        "distill {w}/model --teacher {w}/model --corpus {w}/good.jsonl --held-out {w}/good.jsonl "
        "--steps 1 --out {o} --set speed=9",
        2,
        "speed",
    ),
    "distilling into an old folder": (
        "distill {w}/model --teacher {w}/model --corpus {w}/good.jsonl --held-out {w}/good.jsonl "
        "--steps 1 --out {w}/full",
        2,
        "full",
    ),
    "student with NaN weights": (
        "distill {w}/sick --teacher {w}/model --corpus {w}/good.jsonl --held-out {w}/good.jsonl "
        "--steps 2 --out {o} --set precision=fp32",
        1,
        "",
    ),
    "student of another shape": (
        "distill {w}/other_words --teacher {w}/model --corpus {w}/good.jsonl --held-out {w}/good.jsonl "
        "--steps 1 --out {o}",
        2,
        "vocabular",
    ),
    "fidelity without a teacher": ("evaluate {w}/model --data {w}/good.jsonl", 2, "--teacher"),
    "fidelity without text": ("evaluate {w}/model --teacher {w}/model", 2, "--data"),
    "prompts with unknown constraints": (
        "evaluate --benchmark ifeval --prompts {w}/odd_prompts.jsonl "
        "--responses {w}/answers.jsonl --json {o}",
        2,
        "punctuation:no_vowels",
    ),
    "answers to other prompts": (
        "evaluate --benchmark ifeval --prompts {w}/prompts.jsonl "
        "--responses {w}/stray_answers.jsonl --json {o}",
        2,
        "stray_answers.jsonl",
    ),
    "torn answers": (
        "evaluate --benchmark ifeval --prompts {w}/prompts.jsonl "
        "--responses {w}/torn_answers.jsonl --json {o}",
        2,
        "torn_answers.jsonl",
    ),
    "figures into no folder": (
        "evaluate --benchmark ifeval --prompts {w}/prompts.jsonl --responses {w}/answers.jsonl "
        "--json {w}/nowhere/x.json",
        2,
        "nowhere",
    ),
    "comparing what is no run": ("compare {w}/full {w}/full", 2, "full"),
    "comparing nothing": ("compare {w}/nowhere {w}/nowhere", 2, "nowhere"),
    "verifying nothing": ("verify {w}/nowhere", 2, "nowhere"),
    "reporting on no run": ("report {w}/full", 2, "results.json"),
    "publishing no run": ("publish {w}/full --repo ada/small", 2, "config.json"),
    "a share of two": ("synthesize {w}/model --constraint-share 2 --out {o}", 2, "share"),
}


def contents(root):
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns if path.is_file() else None
        for path in root.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_left(world, tmp_path, name, monkeypatch, capfd):
    template, code, words = CASES[name]
    out = tmp_path / "new"
    arguments = [part.format(w=world, o=out) for part in template.split()]
    monkeypatch.setattr(sys, "argv", ["regrow", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(world)
    before = contents(world)
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capfd.readouterr().err
    after = contents(world)
    assert stopped.value.code == code, said
    assert "Traceback" not in said
    sentences = [line for line in said.splitlines() if line.startswith("regrow: ")]
    assert len(sentences) == 1, said
    assert said.rstrip().endswith(sentences[0])
    assert sentences[0].endswith(".")
    assert words in sentences[0]
    assert after == before
    # A hidden work folder may stay for a run that goes on; nothing may look like a result.
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_the_command_itself_exits_so(world):
    command = [sys.executable, "-m", "regrow", "run", str(world / "unknown_key.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=world, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "prunee" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "bake",
        "run",
        "prune",
        "inspect x --width wide",
        "run x.yaml --sett a=b",
        "evaluate x --benchmark iq",
        "calibrate x --corpus y --out z --device abacus",
        "calibrate x --corpus y --out z --method magic",
        "inspect x --width 0",
        "distill x --teacher y --corpus c --held-out h --steps 0 --out z",
        "synthesize x --num-prompts 0 --out z",
        "calibrate x --corpus y --out z --batch-size 0",
        "calibrate x --corpus y --out z --num-tokens 0",
    ],
)
def test_usage_errors_show_no_traceback(arguments, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["regrow", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capfd.readouterr()
    assert stopped.value.code == 2
    assert "Traceback" not in printed.err + printed.out


def test_a_model_with_its_own_code_is_not_run(world, monkeypatch, capfd):
    folder = world / "own_code"
    shutil.copytree(world / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.chdir(world)
    monkeypatch.setattr(
        sys, "argv", ["regrow", "calibrate", str(folder), "--corpus", str(world / "good.jsonl"), "--out", "x"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "Traceback" not in capfd.readouterr().err
    assert not os.path.exists("ran")

"""The recipe refuses what it does not know, and says so in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from regrow.errors import UserError
from regrow.recipe import load_recipe, parse_recipe
from regrow.runner import check_stages, plan_run
from regrow.stages import one_stage_recipe

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
MINIMAL = {
    "name": "a",
    "model": "some/model",
    "corpora": [{"source": "c.jsonl"}],
    "held_out": {"source": "h.jsonl"},
    "prune": {"width": 256},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_carry_their_file_name(path):
    assert load_recipe(path).name == path.stem


def test_published_recipe_has_the_published_settings():
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "qwen3.5-4b-mlp7808"))
    assert (recipe.prune.width, recipe.prune.criterion, recipe.prune.refit) == (7808, "wanda", False)
    assert recipe.prune.shards == 16
    assert recipe.distill is not None
    assert recipe.distill.max_steps == 12_000
    assert recipe.recover is not None
    assert (recipe.recover.rank, recipe.corpora[0].source) == (32, "yahma/alpaca-cleaned")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prunes": {}}, ["prunes", "spelling"]),
        ({"prune": {"width": 250}}, ["250", "128"]),
        ({"prune": {"width": 256, "shards": 2, "max_shard_size": "1GB"}}, ["shards", "max_shard_size"]),
        ({"prune": {}}, ["prune.width", "missing"]),
        ({"prune": {"width": "wide"}}, ["prune.width", "wide"]),
        ({"prune": {"width": -128}}, ["prune.width", "-128"]),
        ({"corpora": []}, ["corpora"]),
        ({"name": "../up"}, ["name", "../up"]),
        ({"distill": {"max_steps": 10, "lr": 1e-3}}, ["distill.lr", "spelling"]),
        ({"sft": {"max_steps": 10, "batch_size": 4}}, ["sft.batch_size", "spelling"]),
        ({"dpo": {"max_steps": 10, "dropout": 0.1}}, ["dpo.dropout", "spelling"]),
        ({"dpo": {"max_steps": 10, "beta": 0}}, ["dpo.beta", "0"]),
        ({"distill": {"max_steps": 9, "select_by": "last", "patience": 2}}, ["distill", "patience"]),
        ({"finish": {"max_steps": 9, "teacher_mode": "cached"}}, ["finish", "live teacher"]),
        ({"finish": {"max_steps": 9, "teacher_mode": "top_k"}}, ["finish", "live teacher"]),
        ({"recover": {"max_steps": 9, "teacher_mode": "sampled", "loss": "jsd"}}, ["recover", "forward_kl"]),
        ({"distill": {"max_steps": 9, "rollout_engine": "vllm"}}, ["distill", "nothing to write"]),
        ({"distill": {"max_steps": 9, "teacher_entries": 0}}, ["distill.teacher_entries", "0"]),
        ({"finish": {"max_steps": 9, "on_policy_fraction": 0}}, ["on_policy_fraction", "0"]),
        ({"evaluate": {"benchmarks": ["mmlu"]}}, ["benchmarks", "mmlu"]),
        ({"synthesize": [{"out": "s"}]}, ["nothing reads s", "s/train.jsonl"]),
        ({"synthesize": [{"out": "s"}] * 2, "held_out": {"source": "s/held_out.jsonl"}}, ["two entries"]),
        (
            {"synthesize": [{"out": "s"}, {"out": "./s/"}], "held_out": {"source": "s/held_out.jsonl"}},
            ["two entries"],
        ),
        (
            {"synthesize": [{"out": "s"}, {"out": "s/t"}], "held_out": {"source": "s/t/held_out.jsonl"}},
            ["two entries", "s"],
        ),
        ({"synthesize": [{"out": "s"}], "held_out": {"source": "s"}}, ["s/held_out.jsonl", "not s"]),
        ({"synthesize": [{"out": "s"}], "held_out": {"source": "s/trian.jsonl"}}, ["not s/trian.jsonl"]),
        (
            {"synthesize": [{"out": "s", "num_held_out": 0}], "held_out": {"source": "s/held_out.jsonl"}},
            ["num_held_out is 0"],
        ),
        ({"synthesize": [{"out": "."}], "held_out": {"source": "held_out.jsonl"}}, ["no folder of its own"]),
        ({"synthesize": [{"out": "s", "prompt": "p"}]}, ["synthesize.0.prompt", "spelling"]),
        ({"evaluate": {"ifeval": {"repeats": 3}}}, ["evaluate.ifeval", "temperature", "repeats"]),
        ({"evaluate": {"ifeval": {"top_p": 0}}}, ["evaluate.ifeval.top_p", "0"]),
    ],
)
def test_bad_values_are_named_in_one_sentence(change, words):
    with pytest.raises(UserError) as caught:
        parse_recipe(MINIMAL | change, "recipe.yaml")
    message = str(caught.value)
    assert "\n" not in message
    for word in ["recipe.yaml", *words]:
        assert word in message


def test_overrides_reach_nested_keys_and_list_items(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmodel: m\ncorpora: [{source: x}]\nheld_out: {source: y}\nprune: {width: 256}\n")
    recipe = load_recipe(
        path, ["prune.width=384", "distill.max_steps=7", "corpora.0.weight=2.5", "enable_thinking=false"]
    )
    assert recipe.prune.width == 384
    assert recipe.distill is not None
    assert recipe.distill.max_steps == 7
    assert recipe.corpora[0].weight == 2.5
    assert recipe.enable_thinking is False


@pytest.mark.parametrize("override", ["prune.width", "=3", "corpora.4.weight=1", "name.deep=1", "seed=[1"])
def test_malformed_overrides_are_refused(tmp_path, override):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmodel: m\ncorpora: [{source: x}]\nheld_out: {source: y}\nprune: {width: 256}\n")
    with pytest.raises(UserError, match="--set"):
        load_recipe(path, [override])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [", "\x00", "just words"])
def test_files_that_are_no_recipe_are_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        load_recipe(path)


def test_help_and_recipes_do_not_import_torch():
    code = (
        "import sys; import regrow.cli, regrow.recipe, regrow.families, regrow.checkpoint.reader\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_training_verb_sets_keys_of_its_section_and_of_the_recipe():
    given = ["learning_rate=1e-3", "seed=7", "sequence_length=64", "finish.loss=jsd"]
    recipe = one_stage_recipe("finish", "m", ["c"], "h", 5, given)
    assert recipe.finish is not None
    assert (recipe.finish.learning_rate, recipe.finish.loss, recipe.finish.max_steps) == (1e-3, "jsd", 5)
    assert (recipe.seed, recipe.sequence_length, recipe.distill) == (7, 64, None)
    with pytest.raises(UserError, match="no_such_key: is no key of a recipe"):
        one_stage_recipe("distill", "m", ["c"], "h", 5, ["no_such_key=1"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evaluate": {"ifeval": {"engine": "vllm"}}}, "engine vllm .* pip install vllm"),
        ({"evaluate": {"ifeval": {"prompts": "./nope.jsonl"}}}, "nope.jsonl do not exist"),
        ({"finish": {"max_steps": 1, "rollout_engine": "vllm"}}, "engine vllm .* the engine transformers"),
        ({"sft": {"max_steps": 1}}, "sft trains with TRL, .* pip install"),
        (
            {"distill": {"max_steps": 1, "select_by": "development", "development_prompts": "no.jsonl"}},
            "no.jsonl",
        ),
    ],
)
def test_what_a_late_stage_lacks_is_said_at_the_start(tmp_path, monkeypatch, change, words):
    for package in ("trl", "vllm"):
        monkeypatch.setitem(sys.modules, package, None)
    recipe = parse_recipe(MINIMAL | change, "recipe.yaml")
    with pytest.raises(UserError, match=words):
        check_stages(plan_run(recipe, tmp_path), recipe)

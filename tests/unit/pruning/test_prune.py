"""Pruning end to end on tiny checkpoints: what is written, what is reported, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow.errors import UserError
from regrow.modeling.load import load_model, load_tokenizer
from regrow.pruning.calibrate import calibrate
from regrow.pruning.criteria import CRITERIA
from regrow.pruning.plan import load_plan
from regrow.pruning.prune import prune
from regrow.pruning.statistics import Statistics, merge_statistics
from tiny_models import save_tiny_model

WIDTH = {"width": 64, "step": 32}
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "under",
    "over",
    "red",
    "blue",
    "tree",
    "house",
    "and",
    "or",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "chat.jsonl"
    rows = [
        {"text": " ".join(WORDS[(i * j + j * j) % len(WORDS)] for j in range(1, 18 + i % 9))}
        for i in range(80)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def statistics_of(model: Path, corpus: str, out: Path, **options: Any) -> Path:
    settings = {
        "num_tokens": 4000,
        "sequence_length": 120,
        "batch_size": 8,
        "dtype": "float32",
        "device": "cpu",
    }
    calibrate(model=model, corpora=[(corpus, "train", 1.0, None)], out=out, **settings | options)
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    model = save_tiny_model("llama", folder / "model")
    return model, statistics_of(model, corpus, folder / "s.safetensors", fisher=True)


@pytest.fixture(scope="module")
def qwen3_5(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("qwen")
    model = save_tiny_model("qwen3_5", folder / "model", dtype=torch.bfloat16)
    return model, statistics_of(model, corpus, folder / "s.safetensors")


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = {}
    for shard in sorted(model.glob("*.safetensors")):
        loaded |= load_file(shard)
    return loaded


def logits_of(model: Path) -> torch.Tensor:
    """On text of the calibration's kind that is not part of it."""
    text = " ".join(WORDS[(i * i + 3) % len(WORDS)] for i in range(60))
    ids = torch.tensor([load_tokenizer(model)(text)["input_ids"]])
    with torch.no_grad():
        return load_model(model, dtype="float32")(input_ids=ids).logits


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("refit", [False, True])
def test_every_criterion_writes_a_model_that_loads(
    criterion: str, refit: bool, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    model, statistics = llama
    report = prune(
        model=model, out=tmp_path / "m", criterion=criterion, refit=refit, statistics=statistics, **WIDTH
    )
    before, after = tensors_of(model), tensors_of(tmp_path / "m")
    plan = load_plan(tmp_path / "plan.json")
    assert plan.origin["criterion"] == criterion
    assert report["citation"] == CRITERIA[criterion].citation
    for layer in range(2):
        kept = list(plan.kept[f"layers.{layer}"])
        base = f"model.layers.{layer}.mlp."
        assert torch.equal(after[f"{base}gate_proj.weight"], before[f"{base}gate_proj.weight"][kept])
        assert torch.equal(after[f"{base}up_proj.weight"], before[f"{base}up_proj.weight"][kept])
        cut = before[f"{base}down_proj.weight"][:, kept]
        assert torch.equal(after[f"{base}down_proj.weight"], cut) != refit
    for name, value in before.items():
        if ".mlp." not in name:
            assert torch.equal(after[name], value)
    assert torch.isfinite(logits_of(tmp_path / "m")).all()
    assert report["refit"] == refit
    if refit:
        assert all(row["error_after"] < row["error_before"] for row in report["layers"])
    json.dumps(report, allow_nan=False)


def test_reported_error_is_that_of_the_written_weights(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, statistics = llama
    report = prune(model=model, out=tmp_path / "m", statistics=statistics, **WIDTH)
    before, after = tensors_of(model), tensors_of(tmp_path / "m")
    plan = load_plan(tmp_path / "plan.json")
    for layer, row in enumerate(report["layers"]):
        site = f"layers.{layer}"
        assert row["name"] == site
        gram = torch.from_numpy(Statistics(statistics).read(site, "held_out_gram")).double()
        name = f"model.{site}.mlp.down_proj.weight"
        delta = before[name].double().clone()
        power = torch.trace(delta @ gram @ delta.T)
        delta[:, list(plan.kept[site])] -= after[name].double()
        expected = float(torch.trace(delta @ gram @ delta.T) / power)
        assert row["error_after"] == pytest.approx(expected, rel=1e-3)


def test_obs_with_refit_is_closer_to_the_parent_than_wanda(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, statistics = llama
    parent = logits_of(model).log_softmax(-1)
    kl = {}
    for name, options in {"wanda": {"refit": False}, "obs": {"refit": True}}.items():
        prune(
            model=model, out=tmp_path / name / "m", criterion=name, statistics=statistics, **WIDTH, **options
        )
        student = logits_of(tmp_path / name / "m").log_softmax(-1)
        kl[name] = float((parent.exp() * (parent - student)).sum(-1).mean())
    assert kl["obs"] < 0.7 * kl["wanda"]


def test_channels_that_never_fire_go_first_and_leave_the_logits(corpus: str, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    tensors = tensors_of(model)
    for layer in range(2):
        dead = torch.randperm(96, generator=torch.Generator().manual_seed(layer))[:32]
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][dead] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    expected = logits_of(model)
    statistics = statistics_of(model, corpus, tmp_path / "s")
    for criterion in ("wanda", "l2", "activation", "flap", "obs"):
        out = tmp_path / criterion / "m"
        report = prune(
            model=model,
            out=out,
            criterion=criterion,
            statistics=statistics,
            refit=criterion == "obs",
            **WIDTH,
        )
        torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-4)
        assert any("32 of 96 channels never fired" in note for note in report["notes"])


def test_keeping_every_channel_writes_the_same_tensors(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, statistics = llama
    report = prune(model=model, out=tmp_path / "m", width=96, step=32, statistics=statistics)
    before, after = tensors_of(model), tensors_of(tmp_path / "m")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any("nothing is removed" in note for note in report["notes"])


def test_multi_token_prediction_is_pruned_with_its_own_statistics(
    qwen3_5: tuple[Path, Path], tmp_path: Path
) -> None:
    model, statistics = qwen3_5
    report = prune(model=model, out=tmp_path / "m", statistics=statistics, **WIDTH)
    plan = load_plan(tmp_path / "plan.json")
    assert plan.kept.keys() == {"layers.0", "layers.1", "mtp.layers.0"}
    assert [row["name"] for row in report["layers"]] == list(plan.kept)
    assert tensors_of(tmp_path / "m")["mtp.layers.0.mlp.down_proj.weight"].shape == (64, 64)
    assert all(row["error_after"] < row["error_before"] for row in report["layers"])


def test_an_uncalibrated_prediction_layer_goes_by_weight_norms_and_that_is_said(
    qwen3_5: tuple[Path, Path], tmp_path: Path
) -> None:
    from regrow.pruning.statistics import open_statistics

    model, statistics = qwen3_5
    whole = Statistics(statistics)
    layout = {name: value for name, value in whole.layout.items() if not name.startswith("mtp.")}
    with open_statistics(tmp_path / "s", layout) as writer:
        for name in layout:
            site, _, field = name.rpartition(".")
            writer.write(name, whole.read(site, field))
        writer.header = whole.header
    report = prune(model=model, out=tmp_path / "m", statistics=tmp_path / "s", **WIDTH)
    assert any("mtp.layers.0 was not calibrated" in note for note in report["notes"])
    kept = load_plan(tmp_path / "plan.json").kept["mtp.layers.0"]
    norms = tensors_of(model)["mtp.layers.0.mlp.down_proj.weight"].double().abs().sum(0)
    assert set(kept) == set(norms.topk(64).indices.tolist())


def test_a_given_plan_is_followed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, statistics = llama
    prune(model=model, out=tmp_path / "a" / "m", criterion="random", refit=False, seed=7, **WIDTH)
    plan = tmp_path / "a" / "plan.json"
    report = prune(model=model, out=tmp_path / "b" / "m", plan=plan, statistics=statistics, **WIDTH)
    assert (tmp_path / "b" / "plan.json").read_bytes() == plan.read_bytes()
    assert report["criterion"] == "random"
    with pytest.raises(UserError, match="another width"):
        prune(model=model, out=tmp_path / "c", plan=plan, refit=False, width=32, step=32)


def test_the_same_command_gives_the_same_bytes(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, statistics = llama
    for name in ("a", "b"):
        prune(model=model, out=tmp_path / name / "m", statistics=statistics, **WIDTH)
    for file in ("m/model.safetensors", "plan.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_blend_scores_between_its_corpora(llama: tuple[Path, Path], corpus: str, tmp_path: Path) -> None:
    model, statistics = llama
    other = statistics_of(model, corpus, tmp_path / "o", seed=5, num_tokens=1500, fisher=True)
    merge_statistics([statistics, other], tmp_path / "m.safetensors", weights=[0.5, 0.5])
    report = prune(model=model, out=tmp_path / "m", statistics=tmp_path / "m.safetensors", **WIDTH)
    assert all(row["error_after"] < row["error_before"] for row in report["layers"])


def test_what_cannot_work_is_refused_before_anything_is_written(
    llama: tuple[Path, Path], qwen3_5: tuple[Path, Path], corpus: str, tmp_path: Path
) -> None:
    model, statistics = llama
    plain = statistics_of(model, corpus, tmp_path / "plain", correlations=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"statistics": qwen3_5[1]}, "another model"),
        ({"statistics": None}, "needs statistics"),
        ({"statistics": None, "criterion": "wanda", "refit": False}, "needs statistics"),
        ({"statistics": plain}, "correlations: true"),
        ({"statistics": plain, "criterion": "wanda"}, "correlations: true"),
        ({"statistics": plain, "criterion": "fisher", "refit": False}, "fisher: true"),
        ({"statistics": statistics, "criterion": "nonsense"}, "nonsense"),
        ({"statistics": statistics, "width": 128}, "above the model"),
        ({"statistics": statistics, "width": 50}, "multiple"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            prune(model=model, out=tmp_path / "out" / "m", **{**WIDTH, **options})
    assert not (tmp_path / "out").exists()

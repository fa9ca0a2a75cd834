"""Statistics behind pruned layers, against a plain pass of the parent and of a model pruned by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.data.blend import encode_corpora
from regrow.errors import UserError
from regrow.modeling.load import load_model, load_tokenizer
from regrow.pruning.calibrate import calibrate, choose_rows
from regrow.pruning.plan import load_plan
from regrow.pruning.prune import prune
from regrow.pruning.statistics import Statistics
from tiny_models import save_tiny_model

WIDTH, TOKENS, LENGTH = 64, 3000, 90


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "chat.jsonl"
    rows = [{"text": f"Row {i} of {i * i}: " + "so it goes, " * (1 + i % 5)} for i in range(90)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def run(model: Path, corpus: str, out: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_tokens": TOKENS,
        "sequence_length": LENGTH,
        "batch_size": 4,
        "dtype": "float32",
        "device": "cpu",
        "method": "sequential",
        "width": WIDTH,
    }
    return calibrate(model=model, corpora=[(corpus, "train", 1.0, None)], out=out, **settings | options)


def cut(model: Path, statistics: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = {"width": WIDTH, "step": 16, "statistics": statistics}
    return prune(model=model, out=out / "model", **settings | options)


@pytest.mark.parametrize(
    ("family", "criterion", "scale"), [("llama", "obs_fisher", 1.0), ("granite", "obs", 0.5)]
)
def test_second_layer_is_counted_behind_the_pruned_first(
    family: str, criterion: str, scale: float, corpus: str, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "parent")
    if family == "granite":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"residual_multiplier": scale}))
    run(folder, corpus, tmp_path / "s", criterion=criterion, spill_bytes=1000)
    cut(folder, tmp_path / "s", tmp_path / "pruned", criterion=criterion)

    parent: Any = load_model(folder, dtype="float32")
    student: Any = load_model(folder, dtype="float32")
    pruned: Any = load_model(tmp_path / "pruned" / "model", dtype="float32")
    kept = list(load_plan(tmp_path / "pruned" / "plan.json").kept["layers.0"])
    down = student.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.weight.zero_()
        down.weight[:, kept] = pruned.model.layers[0].mlp.down_proj.weight
        if down.bias is not None:
            torch.testing.assert_close(down.bias, pruned.model.layers[0].mlp.down_proj.bias)
    seen: dict[str, torch.Tensor] = {}
    parent.model.layers[1].register_forward_hook(
        lambda m, a, o: seen.update(wanted=o[0] if isinstance(o, tuple) else o)
    )
    student.model.layers[1].register_forward_hook(
        lambda m, a, o: seen.update(found=o[0] if isinstance(o, tuple) else o)
    )
    student.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    encoded = encode_corpora(load_tokenizer(folder), [(corpus, "train", 1.0, None)], max_length=LENGTH)
    share = choose_rows(encoded.rows, TOKENS, 0.125, 0, 96)
    gram, cross, power = torch.zeros(2, 96, 96).double(), torch.zeros(2, 64, 96).double(), 0.0
    for index, row in enumerate(share.rows):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            parent(input_ids=ids)
            student(input_ids=ids)
        x = seen["x"].reshape(-1, 96).double()
        d = (seen["wanted"] - seen["found"])[0].double() / scale
        held_out = int(index in share.held_out)
        gram[held_out] += x.T @ x
        cross[held_out] += d.T @ x
        power += held_out * float(d.square().sum())
    statistics = Statistics(tmp_path / "s")
    assert power > 0
    for field, value in {
        "gram": gram[0],
        "held_out_gram": gram[1],
        "shift": cross[0],
        "held_out_shift": cross[1],
        "held_out_shift_power": torch.tensor([power]).double(),
    }.items():
        got = torch.from_numpy(statistics.read("layers.1", field)).double()
        torch.testing.assert_close(got, value, rtol=1e-3, atol=float(1e-4 * value.abs().max()))


def test_makes_up_for_earlier_layers(corpus: str, tmp_path: Path) -> None:
    """What leaves the last layer is nearer to the parent's than without it, on text of the same kind."""
    folder = save_tiny_model("llama", tmp_path / "parent")
    run(folder, corpus, tmp_path / "s")
    run(folder, corpus, tmp_path / "p", method="in_memory")
    parent: Any = load_model(folder, dtype="float32")
    tokenizer = load_tokenizer(folder)
    rows = [f"Row {i} of {i * i}: " + "so it goes, " * (1 + i % 5) for i in range(90, 110)]
    batches = [torch.tensor([tokenizer(row).input_ids]) for row in rows]

    def before_norm(model: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(lambda m, a: seen.append(a[0][0]))
        with torch.no_grad():
            for ids in batches:
                model(input_ids=ids)
        handle.remove()
        return torch.cat(seen)

    errors = {}
    for name in ("s", "p"):
        cut(folder, tmp_path / name, tmp_path / f"pruned-{name}", criterion="obs")
        student: Any = load_model(tmp_path / f"pruned-{name}" / "model", dtype="float32")
        errors[name] = float((before_norm(student) - before_norm(parent)).square().mean())
    assert errors["s"] < errors["p"]


def test_statistics_are_for_one_way_of_pruning(corpus: str, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "parent")
    run(folder, corpus, tmp_path / "s")
    for options in ({"width": 48}, {"criterion": "wanda"}, {"refit": False}):
        with pytest.raises(UserError, match="behind layers pruned to 64 by obs"):
            cut(folder, tmp_path / "s", tmp_path / "out", **{"criterion": "obs", **options})
    assert not (tmp_path / "out").exists()


def test_multi_token_prediction_sees_the_pruned_trunk(corpus: str, tmp_path: Path) -> None:
    folder = save_tiny_model("qwen3_5", tmp_path / "parent", dtype=torch.bfloat16)
    run(folder, corpus, tmp_path / "s", criterion="obs_fisher", dtype="bfloat16")
    report = cut(folder, tmp_path / "s", tmp_path / "out", criterion="obs_fisher")
    assert any("has no gradients; its channels are chosen by obs" in note for note in report["notes"])
    assert all(layer["error_after"] < layer["error_before"] for layer in report["layers"])
    statistics = Statistics(tmp_path / "s")
    assert not statistics.has("mtp.layers.0", "shift")


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_norm_behind_the_mlp_is_refused(family: str, corpus: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / "parent")
    with pytest.raises(UserError, match="does not add its MLP's output"):
        run(folder, corpus, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_what_it_cannot_do_is_refused(corpus: str, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "parent")
    for options, text in (
        ({"width": None}, "to which width"),
        ({"width": 97}, "above the model's intermediate size"),
        ({"correlations": False}, "correlations: true"),
        ({"criterion": "magnitude"}, "needs statistics"),
    ):
        with pytest.raises(UserError, match=text):
            run(folder, corpus, tmp_path / "s", **options)
    experts = save_tiny_model("qwen3_moe", tmp_path / "experts")
    with pytest.raises(UserError, match="exactly one dense MLP"):
        run(experts, corpus, tmp_path / "s", width=32)

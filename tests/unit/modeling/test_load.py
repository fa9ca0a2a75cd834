import json

import pytest
import torch

from regrow.errors import UserError
from regrow.modeling.load import load_model, load_tokenizer, pick_device
from regrow.modeling.sources import resolve_model
from tiny_models import save_tiny_model


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model("llama", tmp_path / "model")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_loads_in_eval_mode_in_the_dtype_asked_for(folder):
    model = load_model(folder)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert load_model(folder, dtype="float32").dtype == torch.float32
    assert load_model(folder, dtype="auto").dtype == torch.float32  # as saved
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        load_model(folder, dtype="int8")


def test_qwen3_5_loads_its_text_model(tmp_path):
    model = load_model(save_tiny_model("qwen3_5", tmp_path / "model"), dtype="float32")
    assert type(model).__name__ == "Qwen3_5ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
        ({"intermediate_size": 95}, "cannot be loaded"),
        ({"num_hidden_layers": 3}, "lacks the weight"),
        ({"model_type": "no_such_model"}, "cannot be loaded"),
    ],
)
def test_unusable_configs_are_one_sentence(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"damaged|cannot be loaded"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)


def test_pickled_weights_are_never_read(folder):
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (open, (str(folder / "opened"), "w"))

    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)
    assert not (folder / "opened").exists()


def test_remote_code_runs_only_when_asked(folder):
    (folder / "modeling_trap.py").write_text("raise SystemExit('remote code ran')\n")
    edit_config(
        folder,
        model_type="trap",
        auto_map={"AutoConfig": "modeling_trap.C", "AutoModelForCausalLM": "modeling_trap.M"},
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)


def test_tokenizer(folder):
    assert load_tokenizer(folder).chat_template
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(folder)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA device"):
        pick_device("cuda")
    with pytest.raises(UserError, match="unknown"):
        pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_sources(folder, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert resolve_model(str(folder)) == folder
    (tmp_path / "empty").mkdir()
    for source, message in {
        str(tmp_path / "empty"): "no config.json",
        str(folder / "config.json"): "is a file",
        "./nothing/here/at/all": "does not exist",
        "owner/name": "Hub cannot be reached",
        "builtin:gpt-5": "not a built-in model",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve_model(source)

"""The engine that writes answers is a choice; vLLM is played by transformers' own generation."""

import contextlib
import sys
from types import SimpleNamespace

import pytest

from regrow.errors import UserError
from regrow.evaluation.ifeval import evaluate_ifeval, ifeval_settings
from regrow.modeling.generate import encode_prompt, generate_responses
from regrow.modeling.load import load_model, load_tokenizer
from regrow.modeling.writers import open_writer
from tiny_models import END_OF_TEXT, IM_END, save_tiny_model
from vllm_stand_in import install_vllm

CONVERSATIONS = [[{"role": "user", "content": text}] for text in ("hello", "count to three", "a b c")]
OPTIONS = {"max_new_tokens": 24, "batch_size": 2, "progress": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("llama_tied", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def vllm(monkeypatch):
    return install_vllm(monkeypatch)


def test_both_engines_give_the_same_responses(folder, vllm):
    tokenizer = load_tokenizer(folder)
    expected = generate_responses(
        load_model(folder, dtype="float32"), tokenizer, CONVERSATIONS, enable_thinking=False, **OPTIONS
    )
    for engine in ("transformers", "vllm"):
        seen = {}
        writer = open_writer(folder, engine=engine, dtype="float32", device="cpu")
        found = writer(CONVERSATIONS, enable_thinking=False, on_result=seen.__setitem__, **OPTIONS)
        assert found == expected
        assert [seen[index] for index in range(3)] == expected
    [(prompts, sampling)] = vllm.asked
    assert [p["prompt_token_ids"] for p in prompts] == [
        encode_prompt(tokenizer, item, False) for item in CONVERSATIONS
    ]
    assert {(params.temperature, params.top_p, params.seed) for params in sampling} == {(0.0, 1.0, None)}
    assert {END_OF_TEXT, IM_END} <= set(sampling[0].stop_token_ids)
    [started] = vllm.started
    assert started["generation_config"] == "vllm"
    assert "gpu_memory_utilization" not in started
    assert started["max_model_len"] == min(
        4_096 + 24, load_model(folder).config.get_text_config().max_position_embeddings
    )


def test_the_end_token_is_counted_and_left_out(folder, vllm):
    writer = open_writer(folder, engine="vllm", dtype="float32", device="cpu")
    output = SimpleNamespace(token_ids=(72, 105, IM_END), finish_reason="stop")
    response = writer._response(output)
    assert (response.token_ids, response.num_tokens, response.finished) == ([72, 105], 3, True)
    output = SimpleNamespace(token_ids=(72, 105), finish_reason="length")
    assert writer._response(output).num_tokens == 2
    assert not writer._response(output).finished


def test_sampling_has_a_seed_per_prompt(folder, vllm):
    writer = open_writer(folder, engine="vllm", dtype="float32", device="cpu")
    writer(CONVERSATIONS, temperature=0.7, top_p=0.9, seed=2, **OPTIONS)
    writer(CONVERSATIONS, temperature=0.7, top_p=0.9, seed=3, **OPTIONS)
    seeds = [params.seed for _, sampling in vllm.asked for params in sampling]
    assert len(set(seeds)) == 6
    writer(CONVERSATIONS, temperature=1.0, seed=2**60, **OPTIONS)
    assert all(0 <= params.seed < 2**63 for _, sampling in vllm.asked for params in sampling)
    assert len(vllm.started) == 1
    assert {params.temperature for params in vllm.asked[0][1]} == {0.7}


def test_what_cannot_write_is_refused_in_one_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        open_writer(folder, engine="vllm", dtype="float32", device="cpu")
    with pytest.raises(UserError, match="'pen' is unknown"):
        open_writer(folder, engine="pen", dtype="float32", device="cpu")


def test_the_engine_is_part_of_what_a_result_was_made_with(folder):
    own, other = (
        ifeval_settings(model=folder, prompts="builtin:dev", engine=e) for e in ("transformers", "vllm")
    )
    assert own != other
    assert own["comparable"] == other["comparable"]


def test_a_longer_answer_starts_a_longer_engine(folder, vllm, monkeypatch):
    monkeypatch.setattr("regrow.modeling.writers._LONGEST_PROMPT", 64)
    monkeypatch.setattr("regrow.modeling.writers._CHUNK", 2)
    writer = open_writer(folder, engine="vllm", dtype="float32", device="cpu")
    for tokens in (8, 8, 100):
        writer(CONVERSATIONS, **OPTIONS | {"max_new_tokens": tokens})
    assert [started["max_model_len"] for started in vllm.started] == [72, 164]
    assert [len(prompts) for prompts, _ in vllm.asked] == [2, 1] * 3
    assert vllm.running == 1


def test_a_closed_writer_holds_no_engine(folder, vllm):
    options = {"dtype": "float32", "device": "cpu"}
    writer = open_writer(folder, engine="vllm", gpu_memory_utilization=0.25, **options)
    writer.close()
    assert not vllm.started
    with contextlib.closing(writer), pytest.raises(KeyError):
        writer(CONVERSATIONS, on_result=lambda index, response: {}[index], **OPTIONS)
    assert [started["gpu_memory_utilization"] for started in vllm.started] == [0.25]
    assert vllm.running == 0
    open_writer(folder, engine="transformers", **options).close()


def test_ifeval_ends_its_engine(folder, vllm):
    evaluate_ifeval(
        model=folder, prompts="builtin:dev", limit=2, max_new_tokens=4, engine="vllm", dtype="float32"
    )
    assert (len(vllm.started), vllm.running) == (1, 0)

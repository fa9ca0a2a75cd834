"""Generation against transformers' own `generate`, one prompt at a time."""

import gc
import pkgutil
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from regrow.errors import UserError
from regrow.modeling.buffers import BufferLayer
from regrow.modeling.decoders import open_decoder
from regrow.modeling.generate import encode_prompt, end_token_ids, generate_responses
from regrow.modeling.packed import PLAIN, can_pack
from regrow.modeling.row_cache import RowCache
from tiny_models import VARIANTS, save_tiny_tokenizer, tiny_config, tiny_model

END_IDS = [256, 65, 66, 67, 68, 69, 70]  # common enough for a random model to stop at


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def random_prompts(count, longest=60):
    rng = random.Random(count)
    return ["".join(rng.choice("abc def") for _ in range(rng.randint(2, longest))) for _ in range(count)]


def one_by_one(model, tokenizer, prompt, max_new_tokens):
    ends = end_token_ids(tokenizer, model)
    ids = torch.tensor([encode_prompt(tokenizer, prompt, None)])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    tokens = output[0, ids.shape[1] :].tolist()
    return tokens[:-1] if tokens[-1] in ends else tokens


@pytest.mark.parametrize("family", [*VARIANTS, "qwen3_5_text", "llama in lockstep"])
def test_greedy_text_equals_one_by_one_generation(family, tokenizer, monkeypatch):
    family, _, lockstep = family.partition(" ")
    if lockstep:
        monkeypatch.setattr("regrow.modeling.decoders.can_pack", lambda causal: False)
    monkeypatch.setattr("regrow.modeling.packed._GROUP_ROWS", 2)  # several groups in a batch of three
    model = tiny_model(family)
    model.generation_config.eos_token_id = END_IDS
    prompts = random_prompts(7)
    responses = generate_responses(model, tokenizer, prompts, max_new_tokens=16, batch_size=3, progress=None)
    expected = [one_by_one(model, tokenizer, prompt, 16) for prompt in prompts]
    assert [response.token_ids for response in responses] == expected
    assert len({tuple(tokens) for tokens in expected}) > 2  # the model says different things


@pytest.mark.parametrize("packed", [True, False])
def test_cache_grows_beyond_its_first_buffers(tokenizer, monkeypatch, packed):
    grown = []
    if packed:
        cache, method = "regrow.modeling.packed", "regrow.modeling.packed._PackedLayer.grow"
    else:
        cache, method = "regrow.modeling.row_cache", "regrow.modeling.row_cache.RowCache._lay_out"
        monkeypatch.setattr("regrow.modeling.decoders.can_pack", lambda causal: False)
    monkeypatch.setattr(f"{cache}._GROWTH_COLUMNS", 3)
    original = pkgutil.resolve_name(method)

    def grow(self, *args):
        grown.append(args)
        return original(self, *args)

    monkeypatch.setattr(method, grow)
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = END_IDS
    prompts = [
        *random_prompts(5, longest=6),
        "a much longer prompt than the others, to make the buffers move " * 2,
    ]
    responses = generate_responses(
        model, tokenizer, prompts[::-1], max_new_tokens=40, batch_size=2, progress=None
    )
    assert [r.token_ids for r in responses] == [one_by_one(model, tokenizer, p, 40) for p in prompts[::-1]]
    assert len(grown) > 3


def test_only_tested_architectures_are_packed():
    packed = {family for family in (*VARIANTS, "qwen3_5_text") if can_pack(tiny_model(family))}
    types = {tiny_model(family).config.model_type for family in packed}
    assert types == {*PLAIN} - {"mistral"}  # whose default has a window; see the next test
    assert not packed & {"gemma2", "gemma3_text", "olmo3", "qwen3_5_text"}  # windows, linear attention


@pytest.mark.parametrize("window", [8, None])
def test_sliding_window_with_rows_of_different_age(tokenizer, monkeypatch, window):
    """A window of 8 columns, so that a wrong distance between columns changes the text."""
    monkeypatch.setattr("regrow.modeling.packed._GROUP_ROWS", 2)
    config = tiny_config("mistral")
    config.sliding_window = window
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert can_pack(model) == (window is None)
    model.generation_config.eos_token_id = END_IDS
    prompts = random_prompts(8, longest=40)
    responses = generate_responses(model, tokenizer, prompts, max_new_tokens=24, batch_size=3, progress=None)
    assert [r.token_ids for r in responses] == [one_by_one(model, tokenizer, p, 24) for p in prompts]


def test_what_a_broken_row_leaves_does_not_reach_the_next():
    model = tiny_model("llama")
    with torch.no_grad(), open_decoder(model, 2) as decoder:
        decoder.read([[1] * 9, [2] * 9])
        for layer in decoder._cache._buffers:
            layer.keys[1], layer.values[1] = torch.nan, torch.nan
        decoder.keep([0])
        decoder.read([[3, 4, 5]])
        assert decoder.step([[6], [7]]).isfinite().all()


def test_finished_rows_leave_and_waiting_ones_enter(tokenizer, monkeypatch):
    """Computed rows stay near the tokens written: nothing is spent on finished answers."""
    monkeypatch.setattr("regrow.modeling.decoders.can_pack", lambda causal: False)  # a row in, a token out
    model = tiny_model("llama")
    model.generation_config.eos_token_id = END_IDS
    computed = []
    forward = type(model).forward

    def counting(self, *args, **kwargs):
        computed.append(kwargs["input_ids"].shape)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    prompts = random_prompts(40)
    responses = generate_responses(model, tokenizer, prompts, max_new_tokens=40, batch_size=8, progress=None)
    decoded = sum(shape[0] for shape in computed if shape[1] == 1)
    first_tokens = len(prompts)
    assert decoded == sum(response.num_tokens for response in responses) - first_tokens
    steps = sum(shape[1] == 1 for shape in computed)
    assert steps < 1.2 * decoded / 8  # the batch stays full until the end


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_right_guesses_save_passes_and_wrong_ones_change_nothing(tokenizer, monkeypatch, temperature):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = END_IDS
    passes = []
    forward = type(model).forward

    def counting(self, *args, **kwargs):
        passes.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    def run(guess):
        passes.clear()
        monkeypatch.setattr("regrow.modeling.lookup.Lookup.guess", guess)
        answers = generate_responses(
            model, tokenizer, prompts, max_new_tokens=40, batch_size=8, temperature=temperature, progress=None
        )
        return answers, len(passes)

    monkeypatch.setattr(type(model), "forward", counting)
    prompts = random_prompts(20)
    expected, most = run(lambda self, most: [])
    told = {
        tuple(encode_prompt(tokenizer, p, None)): r.token_ids for p, r in zip(prompts, expected, strict=True)
    }

    def know(self, most):
        for prompt, answer in told.items():
            if tuple(self._tokens[: len(prompt)]) == prompt:
                place = len(self._tokens) - len(prompt)
                return answer[place : place + min(most, 5)]
        raise AssertionError

    right, fewest = run(know)
    assert right == expected
    assert fewest < most / 3
    wrong, count = run(lambda self, most: [7, 8, 9][:most])
    assert wrong == expected
    assert count == pytest.approx(most, abs=3)


def test_responses_say_how_they_ended(tokenizer):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = END_IDS
    prompts = random_prompts(12)
    responses = generate_responses(model, tokenizer, prompts, max_new_tokens=15, batch_size=5, progress=None)
    assert {response.finished for response in responses} == {True, False}
    for response in responses:
        assert response.num_tokens == len(response.token_ids) + response.finished
        assert response.finished or response.num_tokens == 15
        assert not set(response.token_ids) & set(END_IDS)
        assert response.text == tokenizer.decode(response.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_the_cache_is_freed_when_generation_ends(tokenizer, family):
    model = tiny_model(family).eval()
    gc.collect()
    gc.disable()
    try:
        generate_responses(model, tokenizer, ["one", "two and more"], max_new_tokens=4, batch_size=2)
        assert not [held for held in gc.get_objects() if isinstance(held, BufferLayer)]
    finally:
        gc.enable()


def test_results_are_handed_over_as_they_finish(tokenizer):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = END_IDS
    seen = {}
    prompts = random_prompts(12)
    responses = generate_responses(
        model, tokenizer, prompts, max_new_tokens=15, batch_size=4, on_result=seen.__setitem__, progress=None
    )
    assert seen == dict(enumerate(responses))
    assert list(seen) != list(range(12))  # in the order they finished


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampling_does_not_depend_on_the_batch(tokenizer, top_p):
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = END_IDS
    prompts = ["a", "a", *random_prompts(6)]
    sample = {"max_new_tokens": 16, "temperature": 1.5, "top_p": top_p, "progress": None}
    runs = [
        generate_responses(model, tokenizer, prompts, batch_size=size, seed=seed, **sample)
        for size, seed in ((8, 0), (3, 0), (1, 0), (8, 1))
    ]
    assert runs[0] == runs[1] == runs[2] != runs[3]
    assert runs[0][0] != runs[0][1]  # the same prompt twice is answered twice


def test_chat_template_and_thinking_reach_the_model(tokenizer):
    conversation = [{"role": "user", "content": "hi"}]
    for thinking, tail in ((None, ""), (True, "<think>\n"), (False, "<think>\n\n</think>\n\n")):
        text = tokenizer.decode(encode_prompt(tokenizer, conversation, thinking))
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + tail
    model = tiny_model("llama")
    options = {"max_new_tokens": 8, "batch_size": 2, "progress": None}
    [answer] = generate_responses(model, tokenizer, [conversation], enable_thinking=False, **options)
    [raw] = generate_responses(model, tokenizer, [text], **options)
    assert answer == raw


def test_every_end_token_counts(tokenizer):
    model = tiny_model("llama")  # config: 256
    model.generation_config.eos_token_id = [7, 8]
    assert end_token_ids(tokenizer, model) == [
        7,
        8,
        256,
        258,
    ]  # 258: the template's and tokenizer's <|im_end|>
    assert end_token_ids(tokenizer) == [258]


def test_the_models_mode_is_restored(tokenizer):
    model = tiny_model("llama").train()
    generate_responses(model, tokenizer, ["a"], max_new_tokens=2, batch_size=1, progress=None)
    assert model.training
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()  # nothing was left behind in inference mode


def test_nothing_to_do_too_long_and_empty(tokenizer):
    model = tiny_model("llama")
    options = {"max_new_tokens": 8, "batch_size": 2, "progress": None}
    assert generate_responses(model, tokenizer, [], **options) == []
    with pytest.raises(UserError, match=r"Prompt 1 has 505 tokens.*context of 512"):
        generate_responses(model, tokenizer, ["a", "a" * 505], **options)
    with pytest.raises(UserError, match="no tokens"):
        generate_responses(model, tokenizer, [""], **options)


def test_unknown_caches_are_refused():
    from transformers import FalconH1Config

    with pytest.raises(UserError, match="falcon_h1 keeps its context"):
        RowCache(FalconH1Config(num_hidden_layers=2), 1)


@pytest.mark.slow
def test_smollm2_in_fp32_writes_the_same_text_as_one_by_one():
    from regrow.modeling.load import load_model, load_tokenizer
    from regrow.wheels import cache_folder

    folder = cache_folder() / "models" / "smollm2-135m-instruct"
    if not folder.exists():
        pytest.skip("the built-in model is not in the cache; `make demo` puts it there")
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    questions = [
        "Name three colours.",
        "What is 12 times 3? Answer with the number only.",
        "Write two sentences about the sea, in capital letters, and end with the word DONE.",
        "Translate 'good morning' into French.",
        "Hi",
        "List five animals, one per line, each starting with the letter C. " * 3,
    ]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    responses = generate_responses(
        model, tokenizer, conversations, max_new_tokens=40, batch_size=4, progress=None
    )
    expected = [one_by_one(model, tokenizer, conversation, 40) for conversation in conversations]
    assert [response.token_ids for response in responses] == expected
    assert {response.finished for response in responses} == {True, False}

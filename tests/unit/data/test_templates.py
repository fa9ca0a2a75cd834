import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.data.corpora import Example
from regrow.data.templates import encode_example, render_conversation, render_prompt, turn_end_ids
from regrow.errors import UserError
from tiny_models import save_tiny_tokenizer

# ChatML with Qwen3.5's habits: the prompt opens or closes a thinking block, the last answer carries one, the
# history carries none, and contents are trimmed.
THINKING = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for m in messages %}{%- set c = m.content|trim %}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' + c }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + c }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- else %}{{- '<think>\\n' }}{%- endif %}{%- endif %}"
)


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def thinking(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path)
    tokenizer.chat_template = THINKING
    return tokenizer


def masked(tokenizer, encoded):
    ids = [token for token, bit in zip(encoded.input_ids, encoded.response_mask, strict=True) if bit]
    return tokenizer.decode(ids)


def test_mask_covers_answers_and_their_end_token_only(tokenizer):
    messages = [{"role": "system", "content": "S"}, *turns("one", "two", "three", "four")]
    encoded = encode_example(tokenizer, Example(messages=messages), max_length=500)
    assert masked(tokenizer, encoded) == "two<|im_end|>four<|im_end|>"
    assert tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
    )
    assert not encoded.truncated


def test_repeated_contents_do_not_confuse_the_mask(tokenizer):
    encoded = encode_example(tokenizer, Example(messages=turns("a", "a", "a", "a")), max_length=500)
    assert masked(tokenizer, encoded) == "a<|im_end|>a<|im_end|>"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6))
def test_last_answer_is_prompt_plus_answer_for_any_text(tokenizer, contents):
    messages = turns(*contents[: len(contents) // 2 * 2])
    encoded = encode_example(tokenizer, Example(messages=messages), max_length=10_000)
    prompt = tokenizer(render_prompt(tokenizer, messages[:-1]), add_special_tokens=False)["input_ids"]
    answer = tokenizer(messages[-1]["content"] + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == prompt + answer
    assert encoded.response_mask[len(prompt) :] == [True] * (len(answer) - 1) + [False]


def test_truncation_keeps_the_beginning(tokenizer):
    example = Example(messages=turns("question", "answer" * 50))
    whole = encode_example(tokenizer, example, max_length=10_000)
    cut = encode_example(tokenizer, example, max_length=60)
    assert cut.truncated
    assert (cut.input_ids, cut.response_mask) == (whole.input_ids[:60], whole.response_mask[:60])


def test_plain_text_has_no_template(tokenizer):
    encoded = encode_example(tokenizer, Example(text="plain text"), max_length=100)
    assert tokenizer.decode(encoded.input_ids) == "plain text"
    assert all(encoded.response_mask)


def test_conversation_without_answer_has_no_response(tokenizer):
    encoded = encode_example(tokenizer, Example(messages=turns("only a question")), max_length=100)
    assert not any(encoded.response_mask)


@pytest.mark.parametrize(
    ("enable_thinking", "prefix", "answer"),
    [
        (False, "<think>\n\n</think>\n\n", "yes<|im_end|>"),
        (True, "<think>\n", "\n</think>\n\nyes<|im_end|>"),
        (None, "<think>\n", "\n</think>\n\nyes<|im_end|>"),
    ],
)
def test_thinking_prefix_is_the_one_in_use(thinking, enable_thinking, prefix, answer):
    messages = turns("q1", "a1", "q2", " yes ")
    text, spans = render_conversation(thinking, messages, enable_thinking)
    prompt = render_prompt(thinking, messages[:-1], enable_thinking)
    assert prompt.endswith("<|im_start|>assistant\n" + prefix)
    assert text.startswith(prompt)
    encoded = encode_example(
        thinking, Example(messages=messages), max_length=500, enable_thinking=enable_thinking
    )
    # the first answer stands in the history without its block: context, not something the model writes
    assert masked(thinking, encoded) == answer
    assert len(spans) == 1


def test_thoughts_are_part_of_the_answer(thinking):
    messages = turns("q", "a")
    messages[1]["reasoning_content"] = "hm"
    encoded = encode_example(thinking, Example(messages=messages), max_length=500, enable_thinking=True)
    assert masked(thinking, encoded) == "hm\n</think>\n\na<|im_end|>"


@pytest.mark.parametrize(
    ("enable_thinking", "answer"), [(False, "a<|im_end|>"), (True, "\n</think>\n\na<|im_end|>")]
)
def test_template_that_shows_no_block_in_answers_gets_the_prompts(tokenizer, enable_thinking, answer):
    """The tiny template renders thinking blocks in prompts only."""
    messages = turns("q", "a")
    encoded = encode_example(
        tokenizer, Example(messages=messages), max_length=500, enable_thinking=enable_thinking
    )
    prompt = render_prompt(tokenizer, messages[:-1], enable_thinking)
    assert tokenizer.decode(encoded.input_ids) == prompt + answer + "\n"
    assert masked(tokenizer, encoded) == answer


def test_turn_end_is_found_and_ordinary_text_is_not(tokenizer, tmp_path):
    assert turn_end_ids(tokenizer) == [258]
    plain = save_tiny_tokenizer(tmp_path)
    plain.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert turn_end_ids(plain) == []
    plain.chat_template = None
    assert turn_end_ids(plain) == []


def test_missing_or_refusing_template_is_a_user_error(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        encode_example(tokenizer, Example(messages=turns("a", "b")), max_length=10)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content|upper }}{% endfor %}{{ '#' if add_generation_prompt }}"
    )
    with pytest.raises(UserError, match="changes the assistant's text"):
        render_conversation(tokenizer, turns("a", "b c d"), True)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_example(tokenizer, Example(messages=turns("a", "b")), max_length=10)

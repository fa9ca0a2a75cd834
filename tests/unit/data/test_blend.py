import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.data.blend import encode_corpora
from regrow.errors import UserError
from tiny_models import save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def corpus(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_shares_of_tokens_follow_the_weights(tokenizer, tmp_path):
    small = corpus(tmp_path / "small.jsonl", ["a" * 10] * 30)  # 300 tokens
    large = corpus(tmp_path / "large.jsonl", ["b" * 7] * 400)  # 2,800 tokens
    blend = encode_corpora(
        tokenizer, [(small, "train", 1.0, None), (large, "train", 3.0, None)], max_length=64, seed=0
    )
    numbers = blend.one_pass(0)
    assert numbers == list(range(159))
    assert blend.first_pass == blend.rows[:159]
    sources = blend.sources(numbers)
    tokens = [source["num_tokens"] for source in sources]
    assert tokens[0] == 300
    assert 900 <= tokens[1] < 900 + 7  # the share, met by the last whole row
    assert [source["num_rows"] for source in sources] == [30, 129]
    assert any("one pass takes 129 of 400 rows" in note for note in blend.notes)
    assert len(blend.rows) == 430
    twice = blend.sources([*numbers, *numbers[:60]])
    assert [source["num_rows"] for source in twice] == [30, 129]
    assert sum(source["num_rows"] * source["passes"] for source in twice) == pytest.approx(219, abs=1)


def test_hash_says_how_much_of_each_corpus_a_pass_takes(tokenizer, tmp_path):
    small, large = (
        corpus(tmp_path / name, texts) for name, texts in (("a.jsonl", ["aa"]), ("b.jsonl", ["bb", "cc"]))
    )
    same_rows = 0
    for seed in range(30):
        one, other = (
            encode_corpora(
                tokenizer, [(small, "train", 1.0, None), (large, "train", w, None)], max_length=9, seed=seed
            )
            for w in (1.0, 2.0)
        )
        assert [part.share for part in one.parts] == [1, 1]
        assert [part.share for part in other.parts] == [1, 2]
        same_rows += one.rows == other.rows
        assert one.hash != other.hash
    assert same_rows > 0


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
    seed=st.integers(0, 2),
)
def test_passes_go_on_where_the_one_before_ended(tokenizer, sizes, weights, seed):
    with tempfile.TemporaryDirectory() as folder:
        letters = "abc"[: len(sizes)]
        specs = [
            (
                corpus(Path(folder) / f"{letter}.jsonl", [letter * (2 + i) for i in range(size)]),
                "train",
                w,
                None,
            )
            for letter, size, w in zip(letters, sizes, weights, strict=False)
        ]
        blend = encode_corpora(tokenizer, specs, max_length=64, seed=seed)
    assert len({tuple(row.input_ids) for row in blend.rows}) == len(blend.rows) == sum(sizes)
    passes = [blend.one_pass(number) for number in range(4 * max(sizes))]
    assert passes[0] == list(range(len(passes[0])))
    for part, size in zip(blend.parts, sizes, strict=True):
        mine = [[number for number in one if number in set(part.numbers)] for one in passes]
        assert all(len(set(one)) == len(one) == part.share for one in mine)  # no row twice in a pass
        counts = Counter(number for one in mine for number in one)
        assert len(counts) == size  # every row comes
        assert max(counts.values()) - min(counts.values()) <= 1  # and none sooner again than the others
    assert any(part.share == size for part, size in zip(blend.parts, sizes, strict=True))


def test_rows_without_a_token_that_counts_are_left_out_with_a_note(tokenizer, tmp_path):
    whole, cut = {"prompt": "q", "response": "a"}, {"prompt": "q" * 90, "response": "a"}
    specs = []
    for name, rows in (("mixed", [whole, cut]), ("cut", [cut])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        specs.append((str(path), "train", 1.0, None))
    blend = encode_corpora(tokenizer, specs, max_length=60, tokens="response")
    assert [part.source["source"] for part in blend.parts] == [specs[0][0]]
    words = "rows left out: no token of an answer within sequence_length."
    noted = [note for note in blend.notes if "no token" in note]
    assert noted == [f"{specs[0][0]}: 1 of 2 {words}", f"{specs[1][0]}: 1 of 1 {words}"]
    assert len(encode_corpora(tokenizer, specs, max_length=60).rows) == 3
    with pytest.raises(UserError, match=r"^No row of .*cut\.jsonl has .* use tokens: all\.$"):
        encode_corpora(tokenizer, specs[1:], max_length=60, tokens="response")


def test_seed_decides_order_and_hash(tokenizer, tmp_path):
    path = corpus(tmp_path / "a.jsonl", [f"text number {i}" for i in range(50)])
    blends = [
        encode_corpora(tokenizer, [(path, "train", 1.0, None)], max_length=64, seed=s) for s in (0, 0, 1)
    ]
    assert blends[0].hash == blends[1].hash
    assert blends[0].rows == blends[1].rows
    assert blends[0].hash != blends[2].hash
    assert blends[0].parts[0].source["hash"] == blends[2].parts[0].source["hash"]
    key = lambda row: row.input_ids  # noqa: E731
    assert sorted(blends[0].rows, key=key) == sorted(blends[2].rows, key=key)


def test_long_text_becomes_several_rows_and_loses_nothing(tokenizer, tmp_path):
    path = corpus(tmp_path / "a.jsonl", ["abcdefghij" * 10])
    blend = encode_corpora(tokenizer, [(path, "train", 1.0, None)], max_length=30, seed=0)
    assert sorted(len(row.input_ids) for row in blend.rows) == [10, 30, 30, 30]
    assert not any(row.truncated for row in blend.rows)


def test_cut_and_short_rows_are_counted(tokenizer, tmp_path):
    rows = [{"prompt": "q", "response": "a" * 200}, {"prompt": "q", "response": "a"}, {"text": "x"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    blend = encode_corpora(tokenizer, [(str(path), "train", 1.0, None)], max_length=100, seed=0)
    assert len(blend.rows) == 2
    assert any("1 of 2 rows cut off at 100 tokens" in note for note in blend.notes)
    assert any("1 rows left out (fewer than two tokens)" in note for note in blend.notes)


def test_rows_that_the_template_refuses_are_counted(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + tokenizer.chat_template
    )
    rows = [{"prompt": "q", "response": "a", "system": "s"}, {"prompt": "q", "response": "a"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    blend = encode_corpora(tokenizer, [(str(path), "train", 1.0, None)], max_length=100, seed=0)
    assert len(blend.rows) == 1
    assert any("1 rows left out" in note and "no system turn" in note for note in blend.notes)
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match=r"no usable rows.*no system turn"):
        encode_corpora(tokenizer, [(str(path), "train", 1.0, None)], max_length=100, seed=0)


def test_only_rows_to_keep_are_blended_and_a_corpus_without_any_has_no_share(tokenizer, tmp_path):
    paths = [corpus(tmp_path / f"{name}.jsonl", [name * 4, name * 9] * 3) for name in ("a", "b")]
    specs = [(path, "train", 1.0, None) for path in paths]

    def encode(letter):
        wanted = lambda example: letter in example.text and len(example.text) > 4  # noqa: E731
        return encode_corpora(tokenizer, specs, max_length=64, keep=wanted)

    blend = encode("b")
    assert [len(row.input_ids) for row in blend.rows] == [9, 9, 9]
    assert [part.source["source"] for part in blend.parts] == [paths[1]]
    assert [note for note in blend.notes if "to be used" in note] == [
        f"{paths[0]}: 0 of 6 rows are to be used.",
        f"{paths[1]}: 3 of 6 rows are to be used.",
    ]
    with pytest.raises(UserError, match=r"None of the corpora's rows .*use other corpora\.$"):
        encode("c")

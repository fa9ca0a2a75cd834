"""Constraints are drawn without contradictions, with arguments that the checkers take and can be met."""

import random
import re

import pytest

from regrow.data.constraints import KINDS, PUNKT_KINDS, check_response, require_checkers, validate_constraints
from regrow.synthesis.prompts import draw_constrained, load_material
from regrow.synthesis.requirements import KIND_WEIGHTS, conflicts, draw_kinds, draw_requirement
from shared_data import shared

MATERIALS = ["train", "dev"]
SENTENCE = {
    "fr": "Le soleil brille et nous marchons ensemble dans la forêt près de la rivière.",
    "es": "El sol brilla y caminamos juntos por el bosque cerca del río.",
    "de": "Die Sonne scheint und wir gehen zusammen durch den Wald am Fluss.",
    "it": "Il sole splende e camminiamo insieme nel bosco vicino al fiume.",
    "pt": "O sol brilha e nós caminhamos juntos pela floresta perto do rio.",
}


def satisfy(kind, kw):
    """(a response that meets the constraint, one that does not), made without the checkers."""
    name = kind.split(":")[1]
    if name in (
        "capital_word_frequency",
        "number_sentences",
        "number_words",
        "letter_frequency",
        "frequency",
    ):
        number = next(value for value in kw.values() if isinstance(value, int))
        unit = {
            "capital_word_frequency": "NASA ",
            "number_sentences": "We walk home. ",
            "number_words": "word ",
            "letter_frequency": kw.get("letter", "") + "\n",
            "frequency": kw.get("keyword", "") + " ",
        }[name]
        enough, short = "Hm. " + unit * number, unit * (number - 1) or "Hm."
        return (enough, short) if "at least" in kw.values() else (short, enough)
    return {
        "english_capital": lambda: ("WE WALK HOME TOGETHER IN THE RAIN.", "We walk home together."),
        "english_lowercase": lambda: ("we walk home together in the rain.", "We walk home together."),
        "repeat_prompt": lambda: (kw["prompt_to_repeat"] + " Yes.", "Yes."),
        "two_responses": lambda: ("one\n******\ntwo", "one\n\ntwo"),
        "number_placeholders": lambda: (
            "[a] " * kw["num_placeholders"],
            "[a] " * (kw["num_placeholders"] - 1) + "b",
        ),
        "postscript": lambda: (f"Bye.\n{kw['postscript_marker']} One more.", "Bye. One more."),
        "constrained_response": lambda: ("My answer is no.", "No."),
        "json_format": lambda: ('{"a": [1, 2]}', "a is 1"),
        "multiple_sections": lambda: tuple(
            "\n".join(f"{kw['section_spliter']} {i}\ntext" for i in range(1, n + 1))
            for n in (kw["num_sections"], kw["num_sections"] - 1)
        ),
        "number_bullet_lists": lambda: ("* a\n" * kw["num_bullets"], "* a\n" * (kw["num_bullets"] + 1)),
        "number_highlighted_sections": lambda: (
            " ".join(["*a b*"] * kw["num_highlights"]),
            " ".join(["*a b*"] * (kw["num_highlights"] - 1)) or "a b",
        ),
        "title": lambda: ("<<A title>>\ntext", "A title\ntext"),
        "existence": lambda: (" ".join(kw["keywords"]), " ".join(kw["keywords"][1:])),
        "forbidden_words": lambda: ("nothing of it", f"Well, {kw['forbidden_words'][-1]}!"),
        "response_language": lambda: (SENTENCE[kw["language"]], "The sun is shining and we walk together."),
        "nth_paragraph_first_word": lambda: tuple(
            "\n\n".join(
                f"{word if i == kw['nth_paragraph'] else 'Then'} we walk."
                for i in range(1, kw["num_paragraphs"] + 1)
            )
            for word in (kw["first_word"].capitalize(), "Zebras")
        ),
        "number_paragraphs": lambda: tuple(
            "\n***\n".join(["text"] * n) for n in (kw["num_paragraphs"], kw["num_paragraphs"] + 1)
        ),
        "no_comma": lambda: ("a and b", "a, b"),
        "end_checker": lambda: (f"Well. {kw['end_phrase']}", f"{kw['end_phrase']} Well."),
        "quotation": lambda: ('"text"', "text"),
    }[name]()


@pytest.mark.parametrize("name", MATERIALS)
@pytest.mark.parametrize("kind", sorted(KIND_WEIGHTS))
def test_drawn_constraints_can_be_met_and_missed(name, kind, monkeypatch):
    if kind in PUNKT_KINDS:
        monkeypatch.setenv("NLTK_DATA", str(shared("nltk_data/tokenizers/punkt_tab/README").parents[2]))
    material, task = load_material(name), "Describe a walk."
    for seed in range(12):
        part = draw_requirement(random.Random(seed), kind, material, task=task, taken=set())
        assert part.kind == kind
        assert "{" not in part.text
        validate_constraints([kind], [part.kwargs], row="drawn")
        for argument, value in part.kwargs.items():  # the prompt tells everything that is checked
            if "relation" in argument or argument in ("language", "prompt_to_repeat"):
                continue
            for text in value if isinstance(value, list) else [str(value)]:
                assert text in part.text, (argument, part.text)
        good, bad = satisfy(kind, part.kwargs)
        assert check_response("p", good, [kind], [part.kwargs]).strict == [True], (part, good)
        assert check_response("p", bad, [kind], [part.kwargs]).strict == [False], (part, bad)


def test_kinds_are_all_known_and_all_drawn():
    assert set(KIND_WEIGHTS) == set(KINDS)
    rng = random.Random(0)
    assert {kind for _ in range(600) for kind in draw_kinds(rng, 1)} == set(KINDS)


def test_conflicts_are_symmetric_and_include_lm_evals():
    require_checkers([])
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_CONFLICTS, conflict_make

    theirs = conflict_make({kind: set(others) for kind, others in INSTRUCTION_CONFLICTS.items()})
    for kind in KINDS:
        assert conflicts(kind, kind)
        for other in KINDS:
            assert conflicts(kind, other) == conflicts(other, kind)
            if other in theirs[kind]:
                assert conflicts(kind, other), (kind, other)


def test_drawn_kinds_never_conflict():
    rng = random.Random(3)
    for _ in range(500):
        kinds = draw_kinds(rng, 3)
        assert not any(conflicts(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :])


@pytest.mark.parametrize("name", MATERIALS)
def test_keywords_of_one_prompt_do_not_contradict(name):
    material = load_material(name)
    rng = random.Random(1)
    num_pairs = 0
    for _ in range(1500):
        _, task, text, ids, kwargs = draw_constrained(rng, material, 3)
        required = {w for kw in kwargs for key in ("keywords", "keyword") for w in _as_list(kw.get(key, []))}
        forbidden = {w for kw in kwargs for w in kw.get("forbidden_words", [])}
        num_pairs += bool(required and forbidden)
        assert not required & forbidden
        assert not forbidden & set(re.findall(r"[a-z]+", task.lower()))
        if "combination:repeat_prompt" in ids:
            assert text.startswith(task)
    assert num_pairs > 20


def _as_list(value):
    return value if isinstance(value, list) else [value]

"""Draws constraints that lm-eval's checkers can verify, and puts them into words.

The kinds are drawn without contradictions: lm-eval's own table of conflicts is kept, and extended by pairs
that it allows but that cannot both hold, such as lower case with sections headed "SECTION".
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# How often a kind is drawn; common requests (length, commas, keywords) weigh more than curiosities.
KIND_WEIGHTS: dict[str, int] = {
    "change_case:capital_word_frequency": 2,
    "change_case:english_capital": 2,
    "change_case:english_lowercase": 3,
    "combination:repeat_prompt": 3,
    "combination:two_responses": 2,
    "detectable_content:number_placeholders": 2,
    "detectable_content:postscript": 2,
    "detectable_format:constrained_response": 1,
    "detectable_format:json_format": 2,
    "detectable_format:multiple_sections": 2,
    "detectable_format:number_bullet_lists": 3,
    "detectable_format:number_highlighted_sections": 4,
    "detectable_format:title": 3,
    "keywords:existence": 4,
    "keywords:forbidden_words": 4,
    "keywords:frequency": 3,
    "keywords:letter_frequency": 3,
    "language:response_language": 2,
    "length_constraints:nth_paragraph_first_word": 1,
    "length_constraints:number_paragraphs": 2,
    "length_constraints:number_sentences": 4,
    "length_constraints:number_words": 5,
    "punctuation:no_comma": 4,
    "startend:end_checker": 3,
    "startend:quotation": 3,
}
_LANGUAGES = {"fr": "French", "es": "Spanish", "de": "German", "it": "Italian", "pt": "Portuguese"}

_CASE = frozenset({"change_case:english_capital", "change_case:english_lowercase"})
_KEYWORDS = frozenset({"keywords:existence", "keywords:forbidden_words", "keywords:frequency"})
# What a kind may be combined with, where that is only a few kinds.
_ONLY_WITH: dict[str, frozenset[str]] = {
    "combination:repeat_prompt": frozenset({"detectable_format:title", "keywords:existence"}),
    "combination:two_responses": frozenset(
        {"keywords:existence", "keywords:forbidden_words", "detectable_format:title", "punctuation:no_comma"}
    ),
    "detectable_format:constrained_response": frozenset(),
    "detectable_format:json_format": frozenset({"keywords:existence", "keywords:forbidden_words"}),
    "language:response_language": frozenset(
        {
            "length_constraints:number_words",
            "length_constraints:number_sentences",
            "detectable_format:number_bullet_lists",
            "punctuation:no_comma",
            "startend:quotation",
        }
    ),
}
_CONFLICTS: dict[str, frozenset[str]] = {
    "change_case:english_capital": _CASE
    | {"change_case:capital_word_frequency", "detectable_format:multiple_sections"},
    "change_case:english_lowercase": _CASE
    | {"change_case:capital_word_frequency", "detectable_format:multiple_sections"},
    "startend:quotation": frozenset({"detectable_format:title"}),
    "startend:end_checker": frozenset({"detectable_content:postscript"}),
    "detectable_format:multiple_sections": frozenset(
        {
            "detectable_format:number_highlighted_sections",
            "length_constraints:number_paragraphs",
            "length_constraints:nth_paragraph_first_word",
            "length_constraints:number_sentences",
        }
    ),
    "length_constraints:number_sentences": frozenset(
        {
            "length_constraints:number_words",
            "length_constraints:number_paragraphs",
            "length_constraints:nth_paragraph_first_word",
            "detectable_format:number_bullet_lists",
        }
    ),
    "length_constraints:nth_paragraph_first_word": frozenset(
        {
            "length_constraints:number_paragraphs",
            "detectable_content:postscript",
            "detectable_format:title",
            "detectable_format:number_bullet_lists",
        }
    ),
}


@dataclass(frozen=True)
class Requirement:
    """One verifiable constraint: its kind, the checker's arguments, and its wording."""

    kind: str
    kwargs: dict[str, Any]
    text: str


def conflicts(kind: str, other: str) -> bool:
    """Whether two kinds cannot be asked for together (symmetric; a kind conflicts with itself)."""
    return kind == other or any(
        (a in _ONLY_WITH and b not in _ONLY_WITH[a]) or b in _CONFLICTS.get(a, frozenset())
        for a, b in ((kind, other), (other, kind))
    )


def draw_kinds(rng: random.Random, count: int) -> list[str]:
    """Up to `count` kinds that do not contradict each other, the first drawn by `KIND_WEIGHTS`."""
    chosen: list[str] = []
    candidates = dict(KIND_WEIGHTS)
    while candidates and len(chosen) < count:
        kind = rng.choices(list(candidates), weights=list(candidates.values()))[0]
        chosen.append(kind)
        candidates = {other: weight for other, weight in candidates.items() if not conflicts(kind, other)}
    return chosen


def draw_requirement(
    rng: random.Random, kind: str, material: dict[str, Any], *, task: str, taken: set[str]
) -> Requirement:
    """Arguments and wording of one constraint.

    Args:
        rng: source of all choices.
        kind: one of `KIND_WEIGHTS`.
        material: `wordings`, `keywords`, `first_words` and `end_phrases`.
        task: the text before the constraint, which `repeat_prompt` has to repeat.
        taken: words that other constraints of the same prompt use; extended in place.
    """
    kwargs = _ARGUMENTS[kind](rng, material, task, taken)
    relation = next((value for name, value in kwargs.items() if name.endswith("relation")), None)
    wordings = material["wordings"][kind if relation is None else f"{kind}/{relation}"]
    shown = {
        name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in kwargs.items()
    }
    if "language" in kwargs:
        shown["language_name"] = _LANGUAGES[kwargs["language"]]
    return Requirement(kind, kwargs, rng.choice(wordings).format(**shown))


_Arguments = Callable[[random.Random, dict[str, Any], str, set[str]], dict[str, Any]]


def _words(rng: random.Random, material: dict[str, Any], taken: set[str], count: int) -> list[str]:
    words = rng.sample([word for word in material["keywords"] if word not in taken], count)
    taken.update(words)
    return words


def _compare(rng: random.Random, at_least: range, less_than: range, name: str, relation: str) -> dict:
    if rng.random() < 0.6:
        return {name: rng.choice(at_least), relation: "at least"}
    return {name: rng.choice(less_than), relation: "less than"}


def _letter(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.6:
        return {
            "letter": rng.choice("abcdfghlmnorstu"),
            "let_frequency": rng.randint(3, 12),
            "let_relation": "at least",
        }
    return {"letter": rng.choice("jkqvxz"), "let_frequency": rng.randint(3, 8), "let_relation": "less than"}


def _nth_paragraph(rng: random.Random, material: dict[str, Any]) -> dict[str, Any]:
    num_paragraphs = rng.randint(2, 4)
    return {
        "num_paragraphs": num_paragraphs,
        "nth_paragraph": rng.randint(1, num_paragraphs),
        "first_word": rng.choice(material["first_words"]),
    }


_ARGUMENTS: dict[str, _Arguments] = {
    "change_case:capital_word_frequency": lambda rng, *_: _compare(
        rng, range(2, 9), range(3, 9), "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": lambda *_: {},
    "change_case:english_lowercase": lambda *_: {},
    "combination:repeat_prompt": lambda rng, material, task, taken: {"prompt_to_repeat": task},
    "combination:two_responses": lambda *_: {},
    "detectable_content:number_placeholders": lambda rng, *_: {"num_placeholders": rng.randint(1, 5)},
    "detectable_content:postscript": lambda rng, *_: {"postscript_marker": rng.choice(["P.S.", "P.P.S"])},
    "detectable_format:constrained_response": lambda *_: {},
    "detectable_format:json_format": lambda *_: {},
    "detectable_format:multiple_sections": lambda rng, *_: {
        "section_spliter": rng.choice(["Section", "Part", "Chapter", "SECTION"]),
        "num_sections": rng.randint(2, 4),
    },
    "detectable_format:number_bullet_lists": lambda rng, *_: {"num_bullets": rng.randint(2, 6)},
    "detectable_format:number_highlighted_sections": lambda rng, *_: {"num_highlights": rng.randint(1, 4)},
    "detectable_format:title": lambda *_: {},
    "keywords:existence": lambda rng, material, task, taken: {
        "keywords": sorted(_words(rng, material, taken, rng.randint(2, 3)))
    },
    "keywords:forbidden_words": lambda rng, material, task, taken: {
        "forbidden_words": sorted(_words(rng, material, taken, rng.randint(2, 3)))
    },
    "keywords:frequency": lambda rng, material, task, taken: {
        "keyword": _words(rng, material, taken, 1)[0],
        **_compare(rng, range(2, 5), range(2, 4), "frequency", "relation"),
    },
    "keywords:letter_frequency": lambda rng, *_: _letter(rng),
    "language:response_language": lambda rng, *_: {"language": rng.choice(sorted(_LANGUAGES))},
    "length_constraints:nth_paragraph_first_word": lambda rng, material, *_: _nth_paragraph(rng, material),
    "length_constraints:number_paragraphs": lambda rng, *_: {"num_paragraphs": rng.randint(2, 4)},
    "length_constraints:number_sentences": lambda rng, *_: _compare(
        rng, range(3, 13), range(3, 9), "num_sentences", "relation"
    ),
    "length_constraints:number_words": lambda rng, *_: _compare(
        rng, range(40, 181, 10), range(50, 131, 10), "num_words", "relation"
    ),
    "punctuation:no_comma": lambda *_: {},
    "startend:end_checker": lambda rng, material, *_: {"end_phrase": rng.choice(material["end_phrases"])},
    "startend:quotation": lambda *_: {},
}

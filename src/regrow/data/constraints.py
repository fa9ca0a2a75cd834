"""Verifiable constraints: lm-eval's IFEval instruction checkers, made repeatable and safe to call.

The checkers (Zhou et al., arXiv 2311.07911, as shipped in `lm_eval.tasks.ifeval`) decide; this module only
guards them. On their own they draw from Python's global `random` where an argument is missing or odd, use a
randomised language detector, and download tokenizer data when they are imported.
"""

import contextlib
import importlib
import os
import random
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from regrow.data.punkt import require_punkt
from regrow.errors import UserError

_RELATIONS = ("less than", "at least")

# Arguments of every kind of constraint: name -> type. An argument that is absent would be drawn at random by
# the checker, so all of them are required.
KINDS: dict[str, dict[str, type]] = {
    "change_case:capital_word_frequency": {"capital_frequency": int, "capital_relation": str},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "combination:repeat_prompt": {"prompt_to_repeat": str},
    "combination:two_responses": {},
    "detectable_content:number_placeholders": {"num_placeholders": int},
    "detectable_content:postscript": {"postscript_marker": str},
    "detectable_format:constrained_response": {},
    "detectable_format:json_format": {},
    "detectable_format:multiple_sections": {"section_spliter": str, "num_sections": int},
    "detectable_format:number_bullet_lists": {"num_bullets": int},
    "detectable_format:number_highlighted_sections": {"num_highlights": int},
    "detectable_format:title": {},
    "keywords:existence": {"keywords": list},
    "keywords:forbidden_words": {"forbidden_words": list},
    "keywords:frequency": {"keyword": str, "frequency": int, "relation": str},
    "keywords:letter_frequency": {"letter": str, "let_frequency": int, "let_relation": str},
    "language:response_language": {"language": str},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": int,
        "nth_paragraph": int,
        "first_word": str,
    },
    "length_constraints:number_paragraphs": {"num_paragraphs": int},
    "length_constraints:number_sentences": {"num_sentences": int, "relation": str},
    "length_constraints:number_words": {"num_words": int, "relation": str},
    "punctuation:no_comma": {},
    "startend:end_checker": {"end_phrase": str},
    "startend:quotation": {},
}
_END_THINK = "</think>"
PUNKT_KINDS = frozenset({"change_case:capital_word_frequency", "length_constraints:number_sentences"})
# The checkers use these arguments as regular expressions.
_PATTERNS = frozenset({"keywords", "forbidden_words", "keyword", "section_spliter", "postscript_marker"})


@dataclass(frozen=True)
class Verdict:
    """Which constraints one response follows, in the order of its instruction ids.

    Attributes:
        strict: the response as it stands.
        loose: any of eight variants (first or last line removed, asterisks removed) follows.
    """

    strict: list[bool]
    loose: list[bool]


def answer_of(response: str, *, thinking: bool) -> str:
    """The part of a response that is judged: what follows the thinking block.

    Where thinking was asked for and the block never ends, nothing was answered.
    """
    head, separator, answer = response.rpartition(_END_THINK)
    if separator:
        return answer.lstrip("\n")
    return "" if thinking else head + answer


def check_response(
    prompt: str,
    response: str,
    instruction_ids: Sequence[str],
    kwargs: Sequence[Mapping[str, Any]],
    *,
    row: str = "the prompt",
    seed: int = 0,
) -> Verdict:
    """Check one response against its constraints; the same arguments give the same verdict.

    Args:
        prompt: the prompt (some checkers compare with it).
        response: the model's answer, without template tokens.
        instruction_ids: kinds of constraint, keys of `KINDS`.
        kwargs: the arguments of each, in the same order; values of None count as absent.
        row: how messages name the row, e.g. `"key 1122"` or `"dev.jsonl line 7"`.
        seed: seed of `random` and of the language detector during the call; both are put back afterwards.

    Raises:
        UserError: an unknown kind, malformed arguments, or missing tokenizer data.
    """
    arguments = validate_constraints(instruction_ids, kwargs, row=row)
    require_checkers(instruction_ids)
    checkers = _checkers()
    example = checkers.InputExample(
        key=0, instruction_id_list=list(instruction_ids), prompt=prompt, kwargs=arguments
    )
    with _seeded(seed):
        strict = checkers.test_instruction_following_strict(example, response).follow_instruction_list
    with _seeded(seed):
        loose = checkers.test_instruction_following_loose(example, response).follow_instruction_list
    return Verdict([bool(item) for item in strict], [bool(item) for item in loose])


def validate_constraints(
    instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]], *, row: str
) -> list[dict[str, Any]]:
    """The arguments with absent ones left out, after checking kinds, names and types. Needs no lm-eval.

    Raises:
        UserError: naming the row and what is wrong with it.
    """
    if isinstance(instruction_ids, str) or isinstance(kwargs, Mapping) or len(instruction_ids) != len(kwargs):
        raise UserError(f"{row}: instruction_id_list and kwargs must be lists of equal length; mend the row.")
    cleaned = []
    for kind, given in zip(instruction_ids, kwargs, strict=True):
        expected = KINDS.get(kind)
        if expected is None:
            raise UserError(
                f"{row}: {kind!r} is no known kind of constraint; use one of lm-eval's, e.g. "
                "'punctuation:no_comma'."
            )
        if not isinstance(given, Mapping):
            raise UserError(f"{row}: the arguments of {kind} are no JSON object; mend the row's kwargs.")
        present = {name: value for name, value in given.items() if value is not None}
        if set(present) != set(expected):
            raise UserError(
                f"{row}: {kind} takes the arguments {sorted(expected) or 'none'}, not {sorted(present)}; "
                "mend the row's kwargs."
            )
        for name, value in present.items():
            _validate_argument(name, value, expected[name], f"{row}: {name} of {kind}")
        cleaned.append(present)
    return cleaned


def require_checkers(instruction_ids: Sequence[str]) -> None:
    """Load the checkers and the data that these kinds need; call it before long work that ends in a check.

    Raises:
        UserError: lm-eval is not usable, or NLTK's punkt_tab is neither there nor downloadable.
    """
    _checkers()
    if PUNKT_KINDS.intersection(instruction_ids):
        require_punkt()


@lru_cache(maxsize=1)
def _checkers() -> types.ModuleType:
    """lm-eval's `ifeval` task functions; their import would download data, and is kept from it."""
    try:
        nltk: Any = importlib.import_module("nltk")
        download = nltk.download
        nltk.download = lambda *args, **kwargs: False
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                return importlib.import_module("lm_eval.tasks.ifeval.utils")
        finally:
            nltk.download = download
    except ImportError as error:
        raise UserError(
            f"The IFEval checkers cannot be loaded ({error}); run pip install 'lm-eval[ifeval]'."
        ) from None


def _validate_argument(name: str, value: Any, expected: type, where: str) -> None:
    texts: list[Any] = value if isinstance(value, list) else [value]
    if isinstance(value, bool) or not isinstance(value, expected):
        raise UserError(f"{where} must be of type {expected.__name__} (given: {value!r:.80}); mend the row.")
    if not value or (isinstance(value, int) and value < 0):
        # lm-eval leaves out values that are empty or zero, and its checkers then draw a random one
        raise UserError(f"{where} must not be empty, zero or negative (given: {value!r:.80}); mend the row.")
    if name.endswith("relation") and value not in _RELATIONS:
        raise UserError(f"{where} must be one of {list(_RELATIONS)} (given: {value!r:.80}); mend the row.")
    if expected is list and not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{where} must hold non-empty strings (given: {value!r:.80}); mend the row.")
    if name in _PATTERNS:
        for text in texts:
            try:
                re.compile(text)
            except re.error as error:
                raise UserError(
                    f"{where} is used as a regular expression and {text!r:.80} is none ({error}); escape it."
                ) from None


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    from langdetect import DetectorFactory

    state, detector_seed = random.getstate(), DetectorFactory.seed
    random.seed(seed)
    DetectorFactory.seed = seed
    try:
        yield
    finally:
        random.setstate(state)
        DetectorFactory.seed = detector_seed

"""What stages need besides their keys of the recipe: refused before the first one runs, or hashed with them.

The checks raise `UserError` with what is missing; the rest are columns `also` of the table of stages.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrow.data.corpora import is_local
from regrow.errors import UserError
from regrow.packages import require_engine, require_trl
from regrow.recipe import Corpus, Recipe, Synthesize


def check_share(stage: str, recipe: Recipe, processes: int) -> None:
    """Refuse a number of processes among which a stage's steps do not divide.

    Raises:
        UserError: the micro-batches of a step are no multiple of it.
    """
    count = getattr(getattr(recipe, stage, None), "gradient_accumulation_steps", processes)
    if count % processes:
        raise UserError(
            f"{stage}.gradient_accumulation_steps is {count}, which {processes} processes cannot share; "
            f"make it a multiple of {processes} (with a smaller batch_tokens a step stays as large)."
        )


def check_rollouts(stage: str) -> Callable[[Recipe], None]:
    """A check that whoever writes the student's texts in this stage is installed."""
    return lambda recipe: require_engine(getattr(recipe, stage).rollout_engine)


def check_sft(recipe: Recipe) -> None:
    """TRL, and rows to judge where only followed ones are learned from."""
    assert recipe.sft is not None
    require_trl("sft")
    if recipe.sft.rows == "followed" and not _num_constrained(recipe):
        raise UserError(
            "The corpora hold no prompts with constraints, which sft.rows: followed needs; write some with "
            "regrow synthesize --constraint-share, or use rows: all."
        )


def check_dpo(recipe: Recipe) -> None:
    """TRL, who writes, and prompts for as many pairs as are asked for."""
    assert recipe.dpo is not None
    require_trl("dpo")
    check_rollouts("dpo")(recipe)
    found = _num_constrained(recipe)
    if found < recipe.dpo.min_pairs:
        raise UserError(
            f"The corpora hold {found} prompts with constraints and dpo needs {recipe.dpo.min_pairs} pairs "
            "(min_pairs); write more with regrow synthesize --constraint-share, or leave dpo out."
        )


def unwritten(recipe: Recipe) -> list[Synthesize]:
    """The corpora that the parent has yet to write."""
    return [section for section in recipe.synthesize if not (Path(section.out) / "report.json").is_file()]


def is_unwritten(corpus: Corpus, recipe: Recipe) -> bool:
    """Whether a corpus is one of those."""
    source = Path(os.path.normpath(corpus.source))
    return any(source.is_relative_to(os.path.normpath(section.out)) for section in unwritten(recipe))


def _num_constrained(recipe: Recipe) -> float:
    """How many prompts with constraints the corpora hold; of text that is not written yet nobody knows."""
    from regrow.data.constrained import constrained_rows

    if any(is_unwritten(corpus, recipe) for corpus in recipe.corpora):
        asked = any(section.constraint_share or section.prompts for section in unwritten(recipe))
        return math.inf if asked else 0
    return len(constrained_rows([corpus.spec for corpus in recipe.corpora]))


def check_evaluate(recipe: Recipe) -> None:
    """Who answers IFEval, and its prompts where they are a file."""
    if "ifeval" not in recipe.evaluate.benchmarks:
        return
    require_engine(recipe.evaluate.ifeval.engine)
    prompts = recipe.evaluate.ifeval.prompts
    if is_local(prompts):
        from regrow.data.prompts import read_prompts

        read_prompts(prompts, limit=recipe.evaluate.ifeval.limit)


def constraints(recipe: Recipe) -> dict[str, Any]:
    """The constraints of the corpora's rows; the corpora's own hashes cover the text only."""
    from regrow.data.constrained import constraints_hash

    if any(is_unwritten(corpus, recipe) for corpus in recipe.corpora):
        return {}  # they are read again when the text is there
    return {"constraints": constraints_hash([corpus.spec for corpus in recipe.corpora])}


def constraints_of_sft(recipe: Recipe) -> dict[str, Any]:
    """The constraints, where sft judges rows by them."""
    return constraints(recipe) if recipe.sft and recipe.sft.rows == "followed" else {}


def development_prompts(stage: str) -> Callable[[Recipe], dict[str, Any]]:
    """The prompts by which a training stage chooses its weights, where it does so."""

    def prompts(recipe: Recipe) -> dict[str, Any]:
        section = getattr(recipe, stage)
        if section.select_by != "development":
            return {}
        from regrow.data.prompts import hash_prompts, read_prompts

        chosen = read_prompts(section.development_prompts, limit=section.development_limit)
        return {"development": hash_prompts(chosen)}

    return prompts

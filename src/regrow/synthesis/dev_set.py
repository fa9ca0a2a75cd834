"""The development set: checkable prompts for choosing checkpoints, never reported as IFEval.

Its topics, templates and wordings are its own (`assets/prompts/dev.yaml`): it shares no run of eight words
with IFEval or with the training prompts. `python -m regrow.synthesis.dev_set FILE` writes it again, byte for
byte as it is shipped.
"""

import json
import random
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from regrow.data.constraints import validate_constraints
from regrow.errors import RunError, UserError
from regrow.files import disk_errors
from regrow.synthesis.decontaminate import decontaminate_ifeval
from regrow.synthesis.prompts import draw_constrained, load_material, normalise

NUM_PROMPTS = 560
_SEED = 2026
_FIRST_KEY = 90_000  # far from IFEval's keys (1000 to 3757)
_MAX_DRAWS = 20_000
_MAX_USES_OF_A_TASK = 1  # every task text once: prompts differ in more than their constraints


def development_set(num_prompts: int = NUM_PROMPTS, *, seed: int = _SEED) -> list[dict[str, Any]]:
    """Rows in the format of IFEval's file: `key`, `prompt`, `instruction_id_list`, `kwargs`.

    The shares of prompts with one, two and three constraints are about IFEval's (56, 33 and 11 %).
    """
    material = load_material("dev")
    rng = random.Random(f"development set {seed}")
    rows: list[dict[str, Any]] = []
    uses: Counter[str] = Counter()
    for _ in range(_MAX_DRAWS):
        if len(rows) == num_prompts:
            return rows
        num_constraints = rng.choices([1, 2, 3], weights=[56, 33, 11])[0]
        _, task, text, ids, kwargs = draw_constrained(rng, material, num_constraints)
        key = normalise(task)
        if uses[key] >= _MAX_USES_OF_A_TASK or not decontaminate_ifeval([text])[0]:
            continue
        uses[key] += 1
        row = {
            "key": _FIRST_KEY + len(rows),
            "prompt": text,
            "instruction_id_list": list(ids),
            "kwargs": [dict(item) for item in kwargs],
        }
        validate_constraints(ids, kwargs, row=f"key {row['key']}")
        rows.append(row)
    raise RunError(f"The development material gives only {len(rows)} distinct prompts; ask for fewer.")


def development_set_lines(num_prompts: int = NUM_PROMPTS, *, seed: int = _SEED) -> str:
    """The development set as the text of its file."""
    return "".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in development_set(num_prompts, seed=seed)
    )


def shipped_development_set() -> Path:
    """Where the shipped file lies (`builtin:dev` of the recipe)."""
    return Path(str(files("regrow").joinpath("assets", "dev_ifeval.jsonl")))


if __name__ == "__main__":
    try:
        target = Path(sys.argv[1])
        with disk_errors(target):
            target.write_text(development_set_lines(), encoding="utf-8")
    except IndexError:
        sys.exit("usage: python -m regrow.synthesis.dev_set FILE")
    except UserError as error:
        sys.exit(str(error))

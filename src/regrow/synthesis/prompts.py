"""Writes prompts: tasks x topics x styles, a share of them with verifiable constraints.

The material (topics, templates, wordings) is data in `assets/prompts/`. Topics, passages, exercises and
follow-up turns belong to exactly one of the two splits, so a held-out conversation shares no user turn and
no topic with a training conversation.
"""

import hashlib
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from regrow.errors import UserError
from regrow.synthesis.requirements import draw_kinds, draw_requirement

Split = Literal["train", "held_out"]
# Slots that name a manner rather than a topic; both splits use all their values.
_SHARED_SLOTS = frozenset({"audience", "tone", "language", "count", "reader", "manner"})
_HELD_OUT_SHARE = 0.15
_MAX_DRAWS_PER_PROMPT = 200


@dataclass(frozen=True)
class Prompt:
    """What a teacher is asked.

    Attributes:
        id: hash of the conversation's texts: the same prompt has the same id everywhere.
        split: `"train"` or `"held_out"`.
        kind: the sort of task, e.g. `"story"`; `"file"` or `"self"` for prompts from elsewhere.
        turns: the user turns; the teacher answers each.
        system: the system prompt, or None.
        instruction_ids, kwargs: constraints on the answer to the last turn, in lm-eval's terms.
    """

    id: str
    split: Split
    kind: str
    turns: tuple[str, ...]
    system: str | None = None
    instruction_ids: tuple[str, ...] = ()
    kwargs: tuple[dict[str, Any], ...] = field(default=())


def make_prompt(
    turns: tuple[str, ...],
    *,
    split: Split,
    kind: str,
    system: str | None = None,
    instruction_ids: tuple[str, ...] = (),
    kwargs: tuple[dict[str, Any], ...] = (),
) -> Prompt:
    """A prompt whose id is derived from its texts."""
    digest = hashlib.sha256("\0".join([system or "", *turns]).encode()).hexdigest()[:16]
    return Prompt(digest, split, kind, turns, system, instruction_ids, kwargs)


def generate_prompts(
    num_prompts: int,
    *,
    seed: int,
    split: Split = "train",
    constraint_share: float = 0.25,
    system_share: float = 0.25,
    multi_turn_share: float = 0.15,
    style_share: float = 0.5,
) -> list[Prompt]:
    """Distinct prompts of the project's own, the same for the same arguments.

    Args:
        num_prompts: how many.
        seed: seeds every choice.
        split: whose topics are used.
        constraint_share: share of prompts with one to three verifiable constraints (exact up to rounding).
        system_share: probability of a system prompt.
        multi_turn_share: probability of a second user turn, for the tasks that have follow-ups.
        style_share: probability of a wish about the answer's manner, for open tasks without constraints.

    Raises:
        UserError: a share is outside 0..1, or the material is too small for that many distinct prompts.
    """
    for name, share in (
        ("constraint_share", constraint_share),
        ("system_share", system_share),
        ("multi_turn_share", multi_turn_share),
        ("style_share", style_share),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"{name} is {share}; give a share between 0 and 1.")
    material = split_material(load_material("train"), split)
    rng = random.Random(f"prompts {split} {seed}")
    num_constrained = round(num_prompts * constraint_share)
    constrained = [index < num_constrained for index in range(num_prompts)]
    rng.shuffle(constrained)
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for with_constraints in constrained:
        for _ in range(_MAX_DRAWS_PER_PROMPT):
            system = rng.choice(material["systems"]) if rng.random() < system_share else None
            if with_constraints:
                prompt = _constrained_prompt(rng, material, split, system)
            else:
                prompt = _free_prompt(rng, material, split, system, multi_turn_share, style_share)
            key = normalise(prompt.turns[0])
            if key not in seen:
                break
        else:
            raise UserError(
                f"The prompt material holds fewer than {num_prompts} distinct {split} prompts; "
                "ask for fewer, or add a prompt file."
            )
        seen.add(key)
        prompts.append(prompt)
    return prompts


def draw_constrained(
    rng: random.Random, material: dict[str, Any], num_constraints: int
) -> tuple[str, str, str, tuple[str, ...], tuple[dict[str, Any], ...]]:
    """One task with constraints: (kind of task, task, text with constraints, instruction ids, kwargs)."""
    kinds = draw_kinds(rng, num_constraints)
    if kinds == ["detectable_format:constrained_response"]:
        task_kind, task = "yes_no", rng.choice(material["yes_no"])
    else:
        tasks = [task for task in material["tasks"] if task["open"]]
        if "length_constraints:number_sentences" in kinds:
            tasks = [task for task in tasks if task["kind"] != "poem"]  # verses have no clear sentences
        task_kind, task = fill(rng, _draw_task(rng, tasks), material)
    taken = set(re.findall(r"[a-z]+", task.lower()))
    repeat = "combination:repeat_prompt" in kinds
    parts = [draw_requirement(rng, kind, material, task=task, taken=taken) for kind in kinds]
    clauses = [part.text for part in parts]
    # What has to be repeated must stand first; the order in the text is the order of the ids.
    layout = "after" if repeat else rng.choice(["after", "after", "after", "lines", "list", "before"])
    text = _LAYOUTS[layout](task, clauses)
    return task_kind, task, text, tuple(part.kind for part in parts), tuple(part.kwargs for part in parts)


def fill(rng: random.Random, task: dict[str, Any], material: dict[str, Any]) -> tuple[str, str]:
    """(kind, text) of a task's template with a value in every slot."""
    text = task["text"]
    for _, slot, _, _ in string.Formatter().parse(task["text"]):
        if slot == "maths":
            exercise = rng.choice(material["maths"])
            text = exercise.format(a=rng.randint(2, 9), b=rng.randint(11, 60), c=rng.randint(100, 900))
        elif slot:
            text = text.replace("{" + slot + "}", rng.choice(material["slots"][slot]))
    return task["kind"], text


@lru_cache(maxsize=4)
def load_material(name: str) -> dict[str, Any]:
    """The material in `assets/prompts/<name>.yaml`; not to be changed by callers."""
    return yaml.safe_load(files("regrow").joinpath("assets", "prompts", f"{name}.yaml").read_text("utf-8"))


def split_material(material: dict[str, Any], split: Split) -> dict[str, Any]:
    """The part of the training material that one split may use; a fixed cut, whatever the seed."""

    def part(name: str, values: list[Any]) -> list[Any]:
        order = sorted(values, key=lambda value: hashlib.sha256(f"{name}\0{value}".encode()).digest())
        num_held_out = max(1, round(len(values) * _HELD_OUT_SHARE))
        return order[:num_held_out] if split == "held_out" else order[num_held_out:]

    slots = {
        name: values if name in _SHARED_SLOTS else part(name, values)
        for name, values in material["slots"].items()
    }
    follow_ups = {name: part(name, values) for name, values in material["follow_ups"].items()}
    parts = {name: part(name, material[name]) for name in ("yes_no", "maths")}
    return {**material, "slots": slots, "follow_ups": follow_ups, **parts}


def normalise(text: str) -> str:
    """Lower case, words only: what counts as the same user turn."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _free_prompt(
    rng: random.Random,
    material: dict[str, Any],
    split: Split,
    system: str | None,
    multi_turn_share: float,
    style_share: float,
) -> Prompt:
    task = _draw_task(rng, material["tasks"])
    kind, text = fill(rng, task, material)
    if task["open"] and style_share and rng.random() < style_share:
        text = f"{text} {rng.choice(material['styles'])}"
    turns: tuple[str, ...] = (text,)
    follow_ups = material["follow_ups"].get(kind, material["follow_ups"]["any"] if task["open"] else [])
    if follow_ups and rng.random() < multi_turn_share:
        turns = (text, rng.choice(follow_ups))
    return make_prompt(turns, split=split, kind=kind, system=system)


def _constrained_prompt(
    rng: random.Random, material: dict[str, Any], split: Split, system: str | None
) -> Prompt:
    num_constraints = rng.choices([1, 2, 3], weights=[6, 3, 1])[0]
    kind, _, text, ids, kwargs = draw_constrained(rng, material, num_constraints)
    return make_prompt((text,), split=split, kind=kind, system=system, instruction_ids=ids, kwargs=kwargs)


def _draw_task(rng: random.Random, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    return rng.choices(tasks, weights=[task["weight"] for task in tasks])[0]


_LAYOUTS: dict[str, Callable[[str, list[str]], str]] = {
    "after": lambda task, clauses: " ".join([task, *clauses]),
    "lines": lambda task, clauses: "\n".join([task, *clauses]),
    "list": lambda task, clauses: "\n".join([task, "", "Rules:", *(f"- {clause}" for clause in clauses)]),
    "before": lambda task, clauses: " ".join([*clauses, task]),
}

"""What changed item by item between two models that answered the same prompts (flips; arXiv 2407.09141).

Two models of equal accuracy may still answer differently; the flips both ways show it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
_EXAMPLES = 3
_LEVELS = {"prompts": "prompt_level_strict", "instructions": "inst_level_strict"}


def count_flips(records_a: Sequence[Record], records_b: Sequence[Record]) -> dict[str, Any]:
    """What B lost and gained against A, strictly judged: prompts, instructions, and examples of prompts.

    Of several answers to a prompt their successes are added up first, as McNemar's test does; an example
    shows the first answer that changed the same way.
    """
    changes = {level: _changes(records_a, records_b, metric) for level, metric in _LEVELS.items()}
    flips: dict[str, Any] = {
        level: {
            "lost": sum(change < 0 for change in found.values()),
            "gained": sum(change > 0 for change in found.values()),
        }
        for level, found in changes.items()
    }
    examples: dict[str, dict[Any, dict[str, Any]]] = {"lost": {}, "gained": {}}
    for one, other in zip(records_a, records_b, strict=True):
        change = all(other["strict"]) - all(one["strict"])
        if change * changes["prompts"][one["key"], 0] > 0:
            examples["gained" if change > 0 else "lost"].setdefault(one["key"], _example(one, other))
    return flips | {"examples": {way: list(found.values())[:_EXAMPLES] for way, found in examples.items()}}


def _changes(
    records_a: Sequence[Record], records_b: Sequence[Record], metric: str
) -> Counter[tuple[Any, int]]:
    """(prompt's key, item) -> successes of B less those of A."""
    changes: Counter[tuple[Any, int]] = Counter()
    for one, other in zip(records_a, records_b, strict=True):
        for position, (before, after) in enumerate(
            zip(_items(one, metric), _items(other, metric), strict=True)
        ):
            changes[one["key"], position] += after - before
    return changes


def tally_types(records_a: Sequence[Record], records_b: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Per kind of instruction: how many there are, each model's strict successes, what B lost and gained."""
    table: dict[str, dict[str, int]] = {}
    for one, other in zip(records_a, records_b, strict=True):
        for kind, before, after in zip(one["instruction_ids"], one["strict"], other["strict"], strict=True):
            names = ("total", "baseline", "candidate", "lost", "gained")
            entry = table.setdefault(kind, dict.fromkeys(names, 0))
            for name, happened in zip(
                names, (True, before, after, before and not after, after and not before), strict=True
            ):
                entry[name] += bool(happened)
    return dict(sorted(table.items()))


def _items(record: Record, metric: str) -> list[bool]:
    verdicts = [bool(item) for item in record["strict"]]
    return [all(verdicts)] if metric.startswith("prompt_level") else verdicts


def _example(one: Record, other: Record) -> dict[str, Any]:
    return {
        "key": one["key"],
        "prompt": one.get("prompt", ""),
        "instruction_ids": list(one["instruction_ids"]),
        "baseline_strict": list(one["strict"]),
        "candidate_strict": list(other["strict"]),
        "baseline_response": one.get("response", ""),
        "candidate_response": other.get("response", ""),
    }

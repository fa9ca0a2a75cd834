"""Recipes from YAML files and `key=value` overrides."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from regrow.errors import UserError
from regrow.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Raises:
        UserError: the file is missing or no YAML, an override is malformed, or the schema refuses a value;
            the message names the key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"The recipe {path} cannot be read ({reason}); check the path.") from None
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"The recipe {path} is not valid YAML{line}; mend its syntax.") from None
    if not isinstance(value, dict):
        raise UserError(f"The recipe {path} holds no keys; start from one of the shipped recipes.")
    for override in overrides or []:
        apply_override(value, override)
    return parse_recipe(value, str(path))


def parse_recipe(value: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe that is already a dictionary; `where` names it in messages."""
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "extra_forbidden":
            problem = "is no key of a recipe; check its spelling"
        elif first["type"] == "missing":
            problem = "is missing; add it"
        else:
            problem = first["msg"].removeprefix("Value error, ")
            given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r:.80})"
            problem = f"{problem[0].lower()}{problem[1:]}{given}"
        more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
        raise UserError(f"{where}: {key}: {problem}{more}.") from None


def apply_override(recipe: dict[str, Any], override: str) -> None:
    """Set one dotted key of an unvalidated recipe, in place.

    Raises:
        UserError: the override is not `key=value`, or its key runs through a plain value.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override!r} is not of the form key=value, e.g. --set prune.width=7680.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: the value is not valid YAML; quote it.") from None
    *parents, last = key.split(".")
    node: Any = recipe
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        _child(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise UserError(f"--set {override!r}: {part!r} is no position in a list of {len(node)}.")
        return node[int(part)]
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], dict | list):
        raise UserError(f"--set {override!r}: {part!r} holds a plain value, not further keys.")
    return node[part]

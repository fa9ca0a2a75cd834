"""The recipe: everything a run depends on, as one YAML file. Imports no torch."""

from regrow.recipe.reading import apply_override, load_recipe, parse_recipe
from regrow.recipe.schema import Corpus, Engine, Recipe, Synthesize, contradiction, sampling_contradiction

__all__ = [
    "Corpus",
    "Engine",
    "Recipe",
    "Synthesize",
    "apply_override",
    "contradiction",
    "load_recipe",
    "parse_recipe",
    "sampling_contradiction",
]

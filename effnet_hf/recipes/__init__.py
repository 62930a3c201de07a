"""A recipe is a document: one YAML file whose head says command, hardware, hours and expected accuracy.

`load_recipe("b4")` reads a built-in one, `load_recipe("my.yaml")` yours; every field is also a flag of `train`.
"""

from .data_flags import add_data_flags, data_options, data_words
from .options import GROUPS, TRAINING_GROUPS
from .recipe import Recipe, available_recipes, load_recipe, parse_recipe


__all__ = [
    "GROUPS",
    "TRAINING_GROUPS",
    "Recipe",
    "add_data_flags",
    "available_recipes",
    "data_options",
    "data_words",
    "load_recipe",
    "parse_recipe",
]

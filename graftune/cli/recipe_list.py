"""`graftune recipes`: the recipes with their papers and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftune.cli.adapt import settable
from graftune.cli.parsing import OptionParser
from graftune.cli.report import add_json, as_text, show, table
from graftune.recipe_table import Recipe, recipes


def run(arguments: Sequence[str]) -> None:
    """List the recipes with their papers and defaults."""
    parser = OptionParser("recipes", "list the recipes with their papers and defaults", [])
    add_json(parser)
    (given,) = parser.parse(arguments)
    content = {name: contents(recipe) for name, recipe in recipes().items()}
    tables = []
    for name, entry in content.items():
        regularizers = "; ".join(as_text(r) for r in entry["regularizers"]) or "none"
        rows = [("paper", entry["paper"], ""), ("regularizers", regularizers, "")]
        rows += [(f["name"], as_text(f["default"]), f["help"]) for f in entry["adapter"]]
        tables.append(table(("field of adapter", "default", "what it is"), rows, name))
    show(content, tables, given.json)


def contents(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's paper, its regularizers, and its adapter's fields with their defaults."""
    config = recipe.config_cls(**recipe.defaults)
    fields = [
        {
            "name": name,
            "default": getattr(config, name),
            "help": each.metadata.get("help", ""),
        }
        for name, each in settable(recipe.config_cls).items()
    ]
    return {
        "paper": recipe.paper,
        "regularizers": [regularizer.to_dict() for regularizer in recipe.regularizers],
        "adapter": fields,
    }

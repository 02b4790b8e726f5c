"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from graftune.integrations.extras import require

STDOUT = "-"


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command the option `--json [FILE]`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write the results as JSON into a file; without one, print JSON in the table's place",
    )


def quiet() -> None:
    """Turn off the progress bars of loading; training has one of its own."""
    transformers.utils.logging.disable_progress_bar()
    require("datasets").disable_progress_bars()


def console() -> Any:
    """Return where tables are printed; wide where the output is no terminal but a file.

    Raises:
        ImportError: rich is not installed; names the extra.
    """
    found = require("rich.console").Console(highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = 160
    return found


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    title: str | None = None,
    numbers: Sequence[int] = (),
) -> Any:
    """Return a table of plain texts.

    Args:
        columns: their heads; all empty for a table without a head.
        rows: the cells.
        title: what it is about.
        numbers: the columns that are aligned to the right.
    """
    escape = require("rich.markup").escape
    shown = require("rich.table").Table(title=title, show_header=any(columns), title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(
            escape(column), justify="right" if index in numbers else "left", overflow="fold"
        )
    for row in rows:
        shown.add_row(*(escape(as_text(cell)) for cell in row))
    return shown


def metrics_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Any:
    """Return the table of metrics by data set: of the base model, adapted, and the change."""
    rows: list[Sequence[Any]] = []
    for name, metrics in after.items():
        for metric, value in metrics.items():
            old = before.get(name, {}).get(metric, math.nan)
            rows.append((name, metric, f"{old:.4f}", f"{value:.4f}", f"{value - old:+.4f}"))
    columns = ("measured on", "metric", "base model", "adapted", "change")
    return table(columns, rows, "Without and with the adapter", numbers=(2, 3, 4))


def as_text(value: Any) -> str:
    """Return a value in few words."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        known = {name: inner for name, inner in value.items() if inner is not None}
        return ", ".join(f"{name} {as_text(inner)}" for name, inner in known.items())
    if isinstance(value, (list, tuple, set)):
        return ", ".join(as_text(inner) for inner in value)
    return str(value)


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: no NaN, no objects."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write_json(value: Any, file: str | Path) -> None:
    """Write a JSON file: whole, or what was there before."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(as_json(value), encoding="utf-8")
    part.replace(file)


def as_json(value: Any) -> str:
    """Return JSON for people to read as well."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def show(value: Any, tables: Sequence[Any], target: str | None) -> None:
    """Print tables, or JSON to where `--json` says.

    Args:
        value: the content as JSON.
        tables: the content as what rich prints.
        target: None, `STDOUT` for JSON in place of the tables, or a file beside them.
    """
    if target == STDOUT:
        print(as_json(value), end="")
        return
    if target is not None:
        write_json(value, target)
    out = console()
    for shown in tables:
        out.print(shown)

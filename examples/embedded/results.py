"""Measurements by several methods and seeds: kept as JSON while they are made, shown as a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


@dataclass
class Results:
    """Rows of results in a file, which is written after each row: a run that was stopped goes on.

    Args:
        file: the JSON file; the rows in it are kept.
        settings: what the rows have in common.

    Raises:
        ValueError: the file's rows were made with other settings.
    """

    file: Path
    settings: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.file.exists():
            before = json.loads(self.file.read_text(encoding="utf-8"))
            self._check_settings(before["settings"])
            self.rows = before["rows"]

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.settings))
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed:
            raise ValueError(
                f"{self.file} holds results with other settings ({', '.join(changed)}); remove it, "
                "or give another file with --results"
            )

    def has(self, **key: Any) -> bool:
        """Say whether there is a row with these values."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        """Add a row, and write the file anew."""
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "settings": dict(self.settings),
            "environment": environment(),
            "rows": self.rows,
        }
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        part.replace(self.file)


def environment() -> dict[str, Any]:
    """Return the versions and the hardware that results depend on."""
    packages = ("graftune", "peft", "torch", "transformers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    """Return the processor's name, which `platform` leaves out on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def console() -> Console:
    """Return a console for wide tables: what is no terminal has no width of its own."""
    return Console() if Console().is_terminal else Console(width=160)


def table(title: str, rows: Iterable[Row], by: Sequence[str], columns: Mapping[str, str]) -> Table:
    """Return the mean and the standard deviation over seeds, one line for each kind of row.

    Args:
        title: what the table is about.
        rows: the results.
        by: what tells kinds of rows apart, such as method and learning rate.
        columns: the values to show, by their names in a row, with the format of their numbers.
    """
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[name] for name in by), []).append(row)
    shown = Table(*by, "seeds", title=title)
    for name in columns:
        shown.add_column(name, justify="right")
    for kind, some in kinds.items():
        cells = [spread([row[name] for row in some], form) for name, form in columns.items()]
        shown.add_row(*map(str, kind), str(len(some)), *cells)
    return shown


def spread(values: Sequence[float], form: str) -> str:
    """Return mean ± standard deviation, or the value if it is always the same."""
    if len(set(values)) == 1:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"

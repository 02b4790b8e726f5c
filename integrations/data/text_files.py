"""Files of texts: JSON, JSON lines and plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graftune.adapters.base.messages import nearest
from graftune.integrations.data.sources import saved

SUFFIXES = (".json", ".jsonl", ".txt")


def rows_of(source: Any) -> Iterator[tuple[str, Any]] | None:
    """Return the rows of a list, a file or a folder, each with what to call it in an error.

    Args:
        source: see `load_texts`. For what is none of these, None is returned.

    Raises:
        FileNotFoundError: no such file, or a folder without .txt files.
        ValueError: nothing in it, another kind of file, not UTF-8; while it is read, not JSON.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir() and not saved(path):
            return _folder(path)
        if path.suffix.lower() in SUFFIXES and not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return _file(path) if path.is_file() else None
    if isinstance(source, Sequence):
        if not source:
            raise ValueError("the list of texts is empty")
        return ((f"item {i} of the list", {"text": item}) for i, item in enumerate(source))
    return None


def _folder(folder: Path) -> Iterator[tuple[str, Any]]:
    files = [f for f in sorted(folder.rglob("*.txt")) if not f.name.startswith(".")]
    if not files:
        raise FileNotFoundError(f"{folder} has no .txt files")
    return (row for file in files for row in _file(file))


def _file(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{file} is none of {', '.join(SUFFIXES)}.{nearest(file.suffix, SUFFIXES)} Other files "
            "can be loaded with datasets.load_dataset, and its result be given here"
        )
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not content.strip():
        raise ValueError(f"{file} is empty")
    if file.suffix.lower() == ".txt":
        return iter([(str(file), {"text": content})])
    if content.lstrip().startswith("["):
        return _json_list(content, file)
    return _json_lines(content, file)


def _json_lines(content: str, file: Path) -> Iterator[tuple[str, Any]]:
    # Not splitlines: texts in JSON may hold the line separators of Unicode.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {file}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error


def _json_list(content: str, file: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} of {file} is not JSON: {error}") from error
    if not rows:
        raise ValueError(f"{file} is empty")
    yield from ((f"row {number} of {file}", row) for number, row in enumerate(rows))

"""Rows of text data: a text, a prompt with its completion, or the messages of a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graftune.adapters.base.messages import listing, nearest

# The columns of each kind of row, as TRL names them; the first whose columns are all there counts.
CONVENTIONS = (("messages",), ("prompt", "completion"), ("text",))


def columns_of(columns: Iterable[str], text: str = "text", where: str = "the data") -> list[str]:
    """Return which columns hold what is to be learnt.

    Args:
        columns: those that there are.
        text: the column with the texts; another name than "text" goes before all conventions.
        where: what has these columns, for the error.

    Raises:
        ValueError: none of the conventions is met.
    """
    columns = list(columns)
    wanted = CONVENTIONS if text == "text" else ((text,),)
    for names in wanted:
        if set(names) <= set(columns):
            return list(names)
    either = f"{text!r}" if text != "text" else "'text', 'prompt' and 'completion', or 'messages'"
    raise ValueError(
        f"no {either} in {where}, only {listing(columns)}.{nearest(text, columns)} Rename the "
        "columns, or name the one with the texts: load_texts(..., text=...)"
    )


def checked(rows: Iterable[tuple[str, Any]], text: str = "text") -> list[dict[str, Any]]:
    """Return the columns to be learnt of rows that have all been checked.

    A text, a prompt and a completion are strings; messages, and a prompt and completion that are
    parts of a conversation, are lists of messages with a role and a content.

    Args:
        rows: at least one, each with what to call it in an error.
        text: see `columns_of`; this column is returned as "text".

    Raises:
        ValueError: a row that is none, or another kind of row than the first.
    """
    found: list[dict[str, Any]] = []
    kinds: dict[str, type] = {}
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} is {_kind(row)}, not an object with named values")
        if not kinds:
            kinds = {name: type(row[name]) for name in columns_of(row, text, where)}
        for name, kind in kinds.items():
            _check_value(row, name, where)
            if type(row[name]) is not kind:
                raise ValueError(
                    f"{name!r} of {where} is {_kind(row[name])}, in the rows before it is of type "
                    f"{kind.__name__}"
                )
        found.append({"text" if name == text else name: row[name] for name in kinds})
    return found


def _check_value(row: Mapping[str, Any], name: str, where: str) -> None:
    if name not in row:
        raise ValueError(
            f"{where} has no {name!r}, only {listing(row)}; all rows need the same columns"
        )
    part = name in ("prompt", "completion") and isinstance(row[name], list)
    if name == "messages" or part:
        _check_messages(row[name], f"{name!r} of {where}")
    elif not isinstance(row[name], str):
        raise ValueError(f"{name!r} of {where} is {_kind(row[name])}, not a text")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where} is {_kind(messages)}, not a list of messages")
    for index, message in enumerate(messages):
        for name in ("role", "content"):
            value = message.get(name) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise ValueError(
                    f"message {index} in {where} has no text as its {name!r}; a message is "
                    '{"role": "user" or "assistant", "content": "..."}'
                )


def _kind(value: Any) -> str:
    if value in ("", [], {}):
        return "empty"
    return "missing" if value is None else f"of type {type(value).__name__}"

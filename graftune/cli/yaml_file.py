"""Reading a recipe's YAML: keys with their lines, and numbers and words as YAML 1.2 has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from graftune.adapters.base.messages import nearest
from graftune.cli.errors import UsageError


@dataclass(frozen=True)
class Entry:
    """A key's value in a file, and the line of the key."""

    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema.

    In YAML 1.1, which PyYAML reads, `no` is false and `1e-3` is a text: `save_strategy: no` and
    `learning_rate: 1e-3` would not mean what they say.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first
    )


def parse_value(text: str) -> Any:
    """Return the value that a text is in YAML, such as 8, [q_proj, v_proj] or {r: 8}.

    Raises:
        UsageError: it is no YAML.

    Example:
        >>> parse_value("[1e-3, no]")
        [0.001, 'no']
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r} is not YAML: {_reason(error)}") from error


def read_yaml(file: str | Path) -> dict[str, Entry]:
    """Return the keys of a YAML file's mapping.

    Raises:
        FileNotFoundError: there is no such file; the nearest is named.
        UsageError: it is no YAML, no mapping of words, or has a key twice.

    Example:
        >>> read_yaml("recipe.yaml")["learning_rate"]
        Entry(value=0.003, line=7)
    """
    file = Path(file)
    if not file.is_file():
        others = [str(path) for path in file.parent.glob("*.y*ml")]
        raise FileNotFoundError(
            f"there is no recipe file {str(file)!r}.{nearest(str(file), others)}"
        )
    try:
        loader = _Loader(_text(file))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{file} has no keys; it needs lines such as `model: user/name`")
        entries: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise UsageError(f"{file}, line {line}: the key {key!r} is no word")
            if key in entries:
                first = entries[key].line
                raise UsageError(f"{file}, line {line}: {key!r} is there already, in line {first}")
            entries[key] = Entry(loader.construct_object(value_node, deep=True), line)
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {_reason(error)}") from error
    return entries


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error


def _reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}" if mark else problem

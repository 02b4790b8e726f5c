"""YAML files mean what they say, and errors name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftune.cli.errors import UsageError
from graftune.cli.yaml_file import Entry, parse_value, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-1.5E+2", -150.0),
        (".5", 0.5),
        ("3", 3),
        ("-4", -4),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("08", "08"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        (".inf", float("inf")),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{r: 8, scale: 1e-3}", {"r": 8, "scale": 1e-3}),
        ("a picture of a {}.", "a picture of a {}."),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse_value(text) == value


def write(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_keys_have_their_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "# a comment\nmodel: a/b\n\nadapter:\n  r: 4\n")
    assert read_yaml(file) == {"model": Entry("a/b", 2), "adapter": Entry({"r": 4}, 4)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "line 2: 'model' is there already, in line 1"),
        ("- a\n- b\n", "has no keys"),
        ("", "has no keys"),
        ("a: b: c\n", "is not YAML: mapping values are not allowed here in line 1, column 5"),
        ("a: [1, 2\n", "is not YAML: .* in line 2"),
        ("3: a\n", "line 1: the key 3 is no word"),
        ("a: !!python/object:os.system x\n", "is not YAML: could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_yaml(write(tmp_path, text))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "a: b\n")
    with pytest.raises(FileNotFoundError, match=r"Did you mean '.*recipe\.yaml'"):
        read_yaml(tmp_path / "recipes.yaml")


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(UsageError, match=r"is not UTF-8: .* at byte 3"):
        read_yaml(tmp_path / "recipe.yaml")

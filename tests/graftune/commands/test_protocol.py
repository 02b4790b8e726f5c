"""`graftune protocol` on pictures of plain colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SHORT = ["--max_steps", 2, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]


@pytest.fixture
def options(clip: str, pictures: str, tmp_path: Path) -> list[Any]:
    shown = ["--model", clip, "--data", pictures, "--output_dir", tmp_path / "out"]
    return [*shown, "--adapter.r", 2, "--seeds", 1, 2, *SHORT]


def test_base_to_novel(options: list[Any], tmp_path: Path, run: Any) -> None:
    printed = run("protocol", "base-to-novel", *options, "--shots", 1)
    assert "base-to-novel, %, 2 seeds" in printed
    found = json.loads((tmp_path / "out" / "base-to-novel.json").read_text())
    assert [row["seed"] for row in found["rows"]] == [1, 2]
    assert set(found["summary"][0]) == {"base", "novel", "H"}
    assert found["selections"][0]["shots"] == 1
    assert found["versions"]["graftune"]


def test_few_shot(options: list[Any], tmp_path: Path, run: Any) -> None:
    run("protocol", "few-shot", *options, "--counts", 1, 2)
    found = json.loads((tmp_path / "out" / "few-shot.json").read_text())
    assert [row["shots"] for row in found["summary"]] == [1, 2]


def test_cross_dataset(options: list[Any], pictures: str, tmp_path: Path, run: Any) -> None:
    run("protocol", "cross-dataset", *options, "--shots", 1, "--others", pictures)
    found = json.loads((tmp_path / "out" / "cross-dataset.json").read_text())
    assert Path(pictures).name in found["summary"][0]


def test_what_is_refused(options: list[Any], fails: Any) -> None:
    assert "Did you mean 'base-to-novel'" in fails("protocol", "base-to-nowel", *options)
    assert "at least one other data set" in fails("protocol", "cross-dataset", *options)
    assert "fewer than shots" in fails("protocol", "base-to-novel", *options, "--shots", 500)

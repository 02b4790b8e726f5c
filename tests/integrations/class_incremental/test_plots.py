"""The pictures of a sequence of tasks are pictures, of every task and every line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from graftune.integrations.class_incremental import draw_curves, draw_matrix

MATRIX = [[90.0], [70.0, 80.0], [10.0, 20.0, 99.5]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved in a test."""
    saved: list[Any] = []
    original = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_the_matrix(figures: list[Any], tmp_path: Path) -> None:
    draw_matrix(MATRIX, tmp_path / "matrix.png", "three tasks")
    with Image.open(tmp_path / "matrix.png") as image:
        assert min(image.size) > 200
    axis = figures[0].axes[0]
    assert [text.get_text() for text in axis.texts] == ["90", "70", "80", "10", "20", "100"]
    assert axis.get_title() == "three tasks"
    drawn = axis.images[0].get_array()
    assert np.ma.getmaskarray(drawn)[0].tolist() == [False, True, True]


def test_the_curves(figures: list[Any], tmp_path: Path) -> None:
    draw_curves({"OVOR": MATRIX, "L2P": MATRIX[:2]}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    lines = figures[0].axes[0].lines
    assert [line.get_label() for line in lines] == ["OVOR", "L2P"]
    assert lines[0].get_ydata().tolist() == pytest.approx([90.0, 75.0, 43.1666666])
    assert lines[1].get_ydata().tolist() == pytest.approx([90.0, 75.0])


def test_a_row_that_is_too_short(tmp_path: Path) -> None:
    for draw in (draw_matrix, lambda matrix, file: draw_curves({"OVOR": matrix}, file)):
        with pytest.raises(ValueError, match="row 1 has 1 accuracies"):
            draw([[90.0], [70.0]], tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())

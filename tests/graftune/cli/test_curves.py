"""Curves: what a trainer logs, sorted and drawn."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from graftune.cli.curves import draw, series

HISTORY = [
    {"step": 0, "eval_loss": 3.0, "eval_accuracy": 0.1},
    {"step": 2, "loss": 2.5, "task_loss": 2.0, "l2": 0.5, "grad_norm": 1.0, "learning_rate": 0.1},
    {"step": 4, "loss": 1.5, "task_loss": 1.2, "l2": 0.3, "learning_rate": 0.05, "epoch": 1.0},
    {"step": 4, "eval_loss": 2.0, "eval_accuracy": 0.4, "eval_runtime": 0.1, "epoch": 1.0},
    {"step": 4, "other1_loss": 2.0, "other1_accuracy": 0.5},
    {"step": 4, "train_runtime": 1.0, "train_loss": 2.0, "total_flos": 1.0},
]


def test_curves_are_sorted_by_kind() -> None:
    assert series(HISTORY) == {
        "loss": {
            "eval_loss": [(0, 3.0), (4, 2.0)],
            "loss": [(2, 2.5), (4, 1.5)],
            "task_loss": [(2, 2.0), (4, 1.2)],
            "l2": [(2, 0.5), (4, 0.3)],
        },
        "learning rate": {"learning_rate": [(2, 0.1), (4, 0.05)]},
        "metrics": {"accuracy": [(0, 0.1), (4, 0.4)]},
    }
    assert series([]) == {}


def test_they_are_drawn(tmp_path: Path) -> None:
    draw(HISTORY, tmp_path / "curves.png", "a run")
    draw([], tmp_path / "empty.png", "nothing")
    assert Image.open(tmp_path / "curves.png").width > Image.open(tmp_path / "empty.png").width

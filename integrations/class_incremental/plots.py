"""Pictures of a sequence of tasks: the matrix of accuracies, and curves over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graftune.integrations.class_incremental.metrics import Matrix, curve, matrix_rows
from graftune.integrations.extras import require


def draw_matrix(accuracies: Matrix, file: str | Path, title: str = "") -> None:
    """Draw the accuracy on each task after each task into a picture.

    Args:
        accuracies: in percent, as `final_average_accuracy` takes them.
        file: the picture; its ending decides the format.
        title: what stands above it.

    Raises:
        ValueError: a row is too short, or an accuracy is not finite.
        ImportError: matplotlib is not installed; names the extra.

    Example:
        >>> draw_matrix(TaskRecord.read("out/task-9").accuracies, "matrix.png")
    """
    rows = matrix_rows(accuracies)
    tasks = len(rows)
    values = np.full((tasks, tasks), np.nan)
    for task, row in enumerate(rows):
        values[task, : task + 1] = row
    size = max(4.0, 0.6 * tasks + 1.5)
    figure = _figure(size + 1, size)
    axis = figure.add_subplot()
    shown = axis.imshow(values, cmap="viridis", vmin=0, vmax=100)
    for (task, on), value in np.ndenumerate(values):
        if on <= task:
            colour = "white" if value < 60 else "black"
            axis.text(on, task, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set(xlabel="accuracy on task", ylabel="after task", title=title)
    axis.set_xticks(range(tasks))
    axis.set_yticks(range(tasks))
    figure.colorbar(shown, label="%", shrink=0.8)
    figure.savefig(file, dpi=120)


def draw_curves(accuracies: Mapping[str, Matrix], file: str | Path, title: str = "") -> None:
    """Draw the mean accuracy on the tasks so far after each task, a line for each run.

    Args:
        accuracies: by the name of the line; as `draw_matrix` takes them.
        file: the picture; its ending decides the format.
        title: what stands above it.

    Raises:
        ValueError: a row is too short, or an accuracy is not finite.
        ImportError: matplotlib is not installed; names the extra.

    Example:
        >>> record = TaskRecord.read("out/task-9")
        >>> draw_curves({"OVOR": record.accuracies}, "curve.png")
    """
    figure = _figure(6, 4)
    axis = figure.add_subplot()
    for name, matrix in accuracies.items():
        axis.plot(curve(matrix), marker="o", markersize=3, label=name)
    axis.set(xlabel="after task", ylabel="mean accuracy on tasks so far, %", title=title)
    axis.set_ylim(0, 100)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _figure(width: float, height: float) -> Any:
    """A figure that no window belongs to."""
    return require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")

"""What a task × task matrix of accuracies says about learning in sequence and about forgetting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Matrix = Sequence[Sequence[float]]


def final_average_accuracy(accuracies: Matrix) -> float:
    """Return the mean accuracy over all tasks after the last: (1/T) Σ_j A[T, j].

    Every task counts the same, however many images it has (Gradient Episodic Memory, arXiv
    1706.08840, section 3: ACC).

    Args:
        accuracies: A, one row for each of T learned tasks; row t has the accuracies on tasks 1 to
            t after learning task t, and what comes behind them is not looked at. Of any unit.

    Raises:
        ValueError: there is no row, a row is too short, or an accuracy is not finite.

    Example:
        >>> final_average_accuracy([[90.0], [70.0, 80.0]])
        75.0
    """
    return matrix_rows(accuracies)[-1].mean().item()


def curve(accuracies: Matrix) -> list[float]:
    """Return the mean accuracy over the tasks so far, after each task: (1/t) Σ_{j ≤ t} A[t, j].

    Args:
        accuracies: as `final_average_accuracy` takes them.

    Returns:
        T means, the last of which is the final average accuracy.

    Example:
        >>> curve([[90.0], [70.0, 80.0]])
        [90.0, 75.0]
    """
    return [row.mean().item() for row in matrix_rows(accuracies)]


def curve_average(accuracies: Matrix) -> float:
    """Return the mean of the curve: (1/T) Σ_t (1/t) Σ_{j ≤ t} A[t, j].

    The average incremental accuracy (iCaRL, arXiv 1611.07725, section 4.1), with all tasks of one
    weight.

    Args:
        accuracies: as `final_average_accuracy` takes them.

    Example:
        >>> curve_average([[90.0], [70.0, 80.0]])
        82.5
    """
    return float(np.mean(curve(accuracies)))


def forgetting(accuracies: Matrix) -> float:
    """Return how far tasks fell from their best: 1/(T−1) Σ_{j<T} max_{j ≤ t < T} A[t, j] − A[T, j].

    Riemannian Walk (arXiv 1801.10112, section 4.1). The last task is left out, and so is the last
    row from the best: a task that ends better than ever before has a negative part. 0 of one task.

    Args:
        accuracies: as `final_average_accuracy` takes them.

    Example:
        >>> forgetting([[90.0], [70.0, 80.0]])
        20.0
    """
    rows = matrix_rows(accuracies)
    best = _of_earlier(rows, lambda task: max(row[task] for row in rows[task:-1]))
    return float(np.mean(best - rows[-1][:-1])) if len(best) else 0.0


def backward_transfer(accuracies: Matrix) -> float:
    """Return what later tasks did to earlier ones: 1/(T−1) Σ_{j<T} A[T, j] − A[j, j].

    Gradient Episodic Memory (arXiv 1706.08840, section 3: BWT). Negative where tasks were
    forgotten; 0 of one task.

    Args:
        accuracies: as `final_average_accuracy` takes them.

    Example:
        >>> backward_transfer([[90.0], [70.0, 80.0]])
        -20.0
    """
    rows = matrix_rows(accuracies)
    learned = _of_earlier(rows, lambda task: rows[task][task])
    return float(np.mean(rows[-1][:-1] - learned)) if len(learned) else 0.0


METRICS: dict[str, tuple[Callable[[Matrix], float], str]] = {
    "final_average_accuracy": (
        final_average_accuracy,
        "mean over all tasks of the accuracy after the last task",
    ),
    "curve_average": (
        curve_average,
        "mean over time of the mean accuracy on the tasks so far",
    ),
    "forgetting": (
        forgetting,
        "mean over all tasks but the last of their best accuracy before the last task, less that "
        "after it",
    ),
    "backward_transfer": (
        backward_transfer,
        "mean over all tasks but the last of the accuracy after the last task, less that right "
        "after learning the task",
    ),
}


def metrics(accuracies: Matrix) -> dict[str, float]:
    """Return all of these numbers by name; `METRICS` has their definitions in words.

    Args:
        accuracies: as `final_average_accuracy` takes them.

    Example:
        >>> metrics([[90.0], [70.0, 80.0]])["forgetting"]
        20.0
    """
    return {name: function(accuracies) for name, (function, _) in METRICS.items()}


def _of_earlier(rows: list[np.ndarray], value: Callable[[int], float]) -> np.ndarray:
    """A value of each task but the last."""
    return np.array([value(task) for task in range(len(rows) - 1)])


def matrix_rows(accuracies: Matrix) -> list[np.ndarray]:
    """Return the lower triangle, row by row.

    Raises:
        ValueError: there is no row, a row is too short, or an accuracy is not finite.
    """
    if not len(accuracies):
        raise ValueError("the accuracies have no row; give one for each task that was learned")
    rows = []
    for task, given in enumerate(accuracies):
        row = np.asarray(given, dtype=float)[: task + 1]
        if len(row) <= task:
            raise ValueError(
                f"row {task} has {len(row)} accuracies; after task {task} there are {task + 1}, "
                "one for each task so far"
            )
        wrong = [j for j, accuracy in enumerate(row) if not math.isfinite(accuracy)]
        if wrong:
            raise ValueError(
                f"the accuracy on task {wrong[0]} after task {task} is {row[wrong[0]]}; measure "
                "every task so far after each task"
            )
        rows.append(row)
    return rows

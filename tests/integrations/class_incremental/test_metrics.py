"""The numbers of a matrix of accuracies, computed by hand, and what holds of any matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graftune.integrations.class_incremental import (
    METRICS,
    Matrix,
    backward_transfer,
    curve,
    curve_average,
    final_average_accuracy,
    forgetting,
    metrics,
)

NAN = float("nan")
# Task 0 is best after task 1, not when it was learned; task 1 gets better at the end.
BY_HAND = [
    [0.80, NAN, NAN],
    [0.90, 0.60, NAN],
    [0.50, 0.70, 0.75],
]

matrices = st.integers(1, 7).flatmap(
    lambda tasks: arrays(float, (tasks, tasks), elements=st.floats(0, 1))
)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (final_average_accuracy, (0.50 + 0.70 + 0.75) / 3),
        (curve_average, (0.80 + (0.90 + 0.60) / 2 + (0.50 + 0.70 + 0.75) / 3) / 3),
        (forgetting, ((0.90 - 0.50) + (0.60 - 0.70)) / 2),
        (backward_transfer, ((0.50 - 0.80) + (0.70 - 0.60)) / 2),
    ],
)
def test_by_hand(metric: Callable[[Matrix], float], expected: float) -> None:
    assert metric(BY_HAND) == pytest.approx(expected, rel=1e-9)
    triangle = [row[: task + 1] for task, row in enumerate(BY_HAND)]
    assert metric(triangle) == metric(np.array(BY_HAND)) == metric(BY_HAND)


def test_of_one_task() -> None:
    assert metrics([[0.4]]) == {
        "final_average_accuracy": 0.4,
        "curve_average": 0.4,
        "forgetting": 0.0,
        "backward_transfer": 0.0,
    }
    assert all(definition for _, definition in METRICS.values())


@given(matrices)
def test_what_holds_of_any_matrix(matrix: np.ndarray) -> None:
    numbers = metrics(matrix.tolist())
    assert curve(matrix.tolist())[-1] == numbers["final_average_accuracy"]
    assert -1e-12 <= numbers["curve_average"] <= 1 + 1e-12
    # The best before the last task is at least what a task had when it was learned.
    assert numbers["forgetting"] >= -numbers["backward_transfer"] - 1e-12
    percent = metrics((100 * matrix).tolist())
    for name, number in numbers.items():
        assert percent[name] == pytest.approx(100 * number, rel=1e-9, abs=1e-9)


@given(st.integers(1, 7), st.floats(0, 1))
def test_nothing_is_forgotten_where_nothing_changes(tasks: int, accuracy: float) -> None:
    numbers = metrics([[accuracy] * tasks] * tasks)
    assert numbers["forgetting"] == numbers["backward_transfer"] == 0
    assert numbers["final_average_accuracy"] == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "no row"),
        ([[0.5], [0.5]], "row 1 has 1 accuracies"),
        ([[0.5], [NAN, 0.5]], "task 0 after task 1 is nan"),
    ],
)
def test_matrices_that_are_none(matrix: Matrix, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics(matrix)

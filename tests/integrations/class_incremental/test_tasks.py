"""Every image of a class comes in the class's task, with the classifier's output as its label."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from graftune.integrations.class_incremental import ClassOrder, split_tasks

NAMES = ["ant", "bee", "cat", "dog", "elk"]


def table(labels: list[int], names: list[str] | None = None) -> Dataset:
    feature = ClassLabel(names=names or NAMES)
    columns = {"text": [f"row {i}" for i in range(len(labels))], "label": labels}
    return Dataset.from_dict(columns, Features({"text": Value("string"), "label": feature}))


def rows(labels: list[int]) -> list[dict[str, Any]]:
    return [{"text": f"row {i}", "label": label} for i, label in enumerate(labels)]


def contents(part: Any) -> list[tuple[str, int]]:
    return [(row["text"], row["label"]) for row in part]


@given(st.integers(1, 9).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c))), st.integers())
def test_every_row_comes_once(counts: tuple[int, int], draw: int) -> None:
    classes, tasks = counts
    seed = abs(draw) % 1000
    labels = [*range(classes), *range(classes)]
    split = split_tasks(rows(labels), tasks, seed=seed)
    assert len(split.parts) == tasks
    assert split.order.seed == seed
    sizes = [len(names) for names in split.order.tasks]
    assert max(sizes) - min(sizes) <= 1
    found = [(row["text"], split.order.names[row["label"]]) for p in split.parts for row in p]
    assert sorted(found) == sorted((f"row {i}", str(label)) for i, label in enumerate(labels))
    for task, part in enumerate(split.parts):
        assert {row["label"] for row in part} == set(split.order.outputs(task))


def test_the_order_follows_from_the_seed() -> None:
    labels = [*range(5)] * 2
    orders = [split_tasks(table(labels), 2, seed=seed).order for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len({order.names for order in orders}) > 1
    assert split_tasks(table(labels), 2, seed=None).order.tasks == (
        ("ant", "bee", "cat"),
        ("dog", "elk"),
    )


def test_tables_and_rows_are_split_alike() -> None:
    labels = [0, 3, 1, 4, 0, 2]
    tasks = [["dog", 0], ["cat"]]
    by_table = split_tasks(table(labels), tasks)
    by_rows = split_tasks(rows(labels), tasks, names=NAMES)
    assert by_table.order == by_rows.order == ClassOrder((("dog", "ant"), ("cat",)))
    expected = [[("row 0", 1), ("row 1", 0), ("row 4", 1)], [("row 5", 2)]]
    assert [contents(part) for part in by_table.parts] == expected
    assert [contents(part) for part in by_rows.parts] == expected
    assert by_table.parts[0].features["label"].names == ["dog", "ant", "cat"]
    assert by_table.parts[0].column_names == ["text", "label"]


def test_other_data_and_later_tasks_in_the_same_order() -> None:
    order = split_tasks(table([0, 1, 2]), [["cat"], ["ant", "bee"]]).order
    other = table([0, 1, 1], ["bee", "cat"])  # numbered otherwise
    assert [contents(part) for part in order.split(other)] == [
        [("row 1", 0), ("row 2", 0)],
        [("row 0", 2)],
    ]
    longer = order.then(["fox"])
    parts = longer.split(table([0], ["fox"]), first=2)
    assert parts[:2] == [None, None]
    assert contents(parts[2]) == [("row 0", 3)]
    assert longer.outputs(2) == range(3, 4)


@pytest.mark.parametrize(
    ("labels", "tasks", "message"),
    [
        ([0, 1], [["ant"], ["elk"]], r"task 1 has no images: none of the 2 .* 'elk'"),
        ([0, 1], [["ant"], ["bee", 0]], "'ant' is given more than once, in tasks 0 and 1"),
        ([0, 1], [["ant", "ant"]], "'ant' is given more than once, in task 0"),
        ([0, 1], [["ant"], []], "task 1 has no classes"),
        ([0, 1], [], "there are no tasks"),
        ([0, 1], [["aunt"]], "no class 'aunt' .* Did you mean 'ant'"),
        ([0, 1], [[5]], "class 5 is out of range: .* 0 to 4"),
        ([0, 1], [[-1]], "class -1 is out of range"),
        ([0, 1], 6, "tasks is 6; it must be 1 to the number of classes in the data, 5"),
        ([0, 1], 0, "tasks is 0"),
        ([0, 5], 2, "label 5 of row 1 is out of range: there are 5 classes"),
        ([0, -1], 2, "label -1 of row 1 is out of range"),
        ([], 2, "no rows"),
    ],
)
def test_what_cannot_be_split(labels: list[int], tasks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_tasks(rows(labels), tasks, names=NAMES)


def test_columns_that_hold_no_labels() -> None:
    with pytest.raises(ValueError, match=r"no column 'labels' .* Did you mean 'label'"):
        split_tasks(rows([0]), 1, label="labels")
    with pytest.raises(ValueError, match="not the numbers of classes"):
        split_tasks([{"label": 0.5}], 1, names=NAMES)
    assert split_tasks(rows([1, 0]), 1, seed=None).order.names == ("0", "1")

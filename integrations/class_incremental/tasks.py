"""Classes in tasks, one after the other: in which order, and which images belong to which task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftune.adapters.base.messages import listing, nearest
from graftune.integrations.extras import require


@dataclass(frozen=True)
class ClassOrder:
    """Which classes come in which task; the position of a class is its output of the classifier.

    Args:
        tasks: the names of the classes, task by task.
        seed: what decided the order; None where it was given.

    Raises:
        ValueError: there are no tasks, one has no classes, or a class is in two tasks.

    Example:
        >>> order = ClassOrder((("cat", "owl"), ("dog",)))
        >>> order.names, order.outputs(1)
        (('cat', 'owl', 'dog'), range(2, 3))
    """

    tasks: tuple[tuple[str, ...], ...]
    seed: int | None = None

    def __post_init__(self) -> None:
        empty = [number for number, names in enumerate(self.tasks) if not names]
        if empty or not self.tasks:
            what = f"task {empty[0]} has no classes" if empty else "there are no tasks"
            raise ValueError(f"{what}; give each task one class or more")
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            found = [number for number, names in enumerate(self.tasks) if twice[0] in names]
            where = f"tasks {found[0]} and {found[1]}" if len(found) > 1 else f"task {found[0]}"
            raise ValueError(
                f"class {twice[0]!r} is given more than once, in {where}; a class comes in one task"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All classes, in the order of the classifier's outputs."""
        return tuple(name for names in self.tasks for name in names)

    def outputs(self, task: int) -> range:
        """Return the classifier's outputs of a task's classes."""
        start = sum(map(len, self.tasks[:task]))
        return range(start, start + len(self.tasks[task]))

    def then(self, *tasks: Sequence[str]) -> ClassOrder:
        """Return this order with further tasks behind it.

        Example:
            >>> ClassOrder((("cat",),)).then(["dog", "owl"]).tasks
            (('cat',), ('dog', 'owl'))
        """
        return ClassOrder((*self.tasks, *map(tuple, tasks)), self.seed)

    def split(
        self,
        data: Any,
        *,
        label: str = "label",
        names: Sequence[str] | None = None,
        first: int = 0,
    ) -> list[Any]:
        """Return the images of each task; labels become the classifier's outputs.

        Images of classes that are in no task are left out.

        Args:
            data: as `split_tasks` takes them.
            label: the column with the labels.
            names: as `split_tasks` takes them.
            first: earlier tasks are None: their images may be gone.

        Raises:
            ValueError: a task from the first on has no images, a label is out of range, or the data
                have no such column.
        """
        known = _names(data, label, names)
        labels = _labels(data, label, known)
        place = {name: output for output, name in enumerate(self.names)}
        outputs = np.array([place.get(known[number], -1) for number in labels], dtype=int)
        parts: list[Any] = [None] * first
        for task in range(first, len(self.tasks)):
            of_task = self.outputs(task)
            rows = np.flatnonzero((outputs >= of_task.start) & (outputs < of_task.stop))
            if not len(rows):
                raise ValueError(
                    f"task {task} has no images: none of the {len(labels)} is of its classes "
                    f"{listing(self.tasks[task])}; add images, or leave the task out"
                )
            parts.append(_select(data, rows, outputs[rows], label, self.names))
        return parts


@dataclass(frozen=True)
class TaskSplit:
    """A data set in tasks.

    Args:
        order: which classes come in which task.
        parts: the images of each task, their labels being the classifier's outputs; None where
            they are gone.
    """

    order: ClassOrder
    parts: tuple[Any, ...]


def split_tasks(
    data: Any,
    tasks: int | Sequence[Sequence[int | str]],
    *,
    seed: int | None = 0,
    label: str = "label",
    names: Sequence[str] | None = None,
) -> TaskSplit:
    """Split a labelled data set into a sequence of tasks, by their number or by lists of classes.

    Args:
        data: a `datasets.Dataset` such as `load_images` returns, or a list of rows, mappings with a
            whole number as label.
        tasks: how many, of equal numbers of classes, the first ones larger by one where need be;
            or the classes of each task, by names or numbers.
        seed: decides the order of the classes where `tasks` is a number, and is recorded; None
            keeps the data's order.
        label: the column with the labels.
        names: of the classes, in the order of the labels; None takes those of the data's class
            labels, or else the numbers.

    Raises:
        ValueError: a task has no images, a class is in two tasks or unknown, a label is out of
            range, there are more tasks than classes, or the data have no such column.

    Example:
        >>> train = split_tasks(load_images("flowers"), tasks=10, seed=0)
        >>> test = train.order.split(load_images("flowers", split="test"))
    """
    known = _names(data, label, names)
    if isinstance(tasks, int):
        order = ClassOrder(_drawn(known, tasks, seed), seed)
    else:
        order = ClassOrder(tuple(tuple(_name(given, known) for given in task) for task in tasks))
    return TaskSplit(order, tuple(order.split(data, label=label, names=names)))


def _drawn(names: Sequence[str], tasks: int, seed: int | None) -> tuple[tuple[str, ...], ...]:
    if not 1 <= tasks <= len(names):
        raise ValueError(
            f"tasks is {tasks}; it must be 1 to the number of classes in the data, {len(names)}"
        )
    order = np.arange(len(names))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    return tuple(tuple(names[i] for i in part) for part in np.array_split(order, tasks))


def _name(given: int | str, names: Sequence[str]) -> str:
    if isinstance(given, str):
        if given not in names:
            raise ValueError(
                f"there is no class {given!r} in the data, its classes are {listing(names)}."
                f"{nearest(given, names)}"
            )
        return given
    if not 0 <= given < len(names):
        raise ValueError(
            f"class {given} is out of range: the data have {len(names)} classes, numbered 0 to "
            f"{len(names) - 1}"
        )
    return names[given]


def _names(data: Any, label: str, names: Sequence[str] | None) -> Sequence[str]:
    """The classes' names, in the order of the labels."""
    if not len(data):
        raise ValueError("the data have no rows to split into tasks")
    if names is not None:
        return names
    features = getattr(data, "features", None)
    if features is not None and getattr(features.get(label), "names", None):
        return features[label].names
    return [str(number) for number in range(int(_column(data, label).max()) + 1)]


def _labels(data: Any, label: str, names: Sequence[str]) -> np.ndarray:
    """The labels, all of them numbers of classes."""
    labels = _column(data, label)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        raise ValueError(
            f"label {labels[wrong[0]]} of row {wrong[0]} is out of range: there are {len(names)} "
            f"classes, so labels are 0 to {len(names) - 1}; mend the labels, or leave such rows out"
        )
    return labels


def _column(data: Any, label: str) -> np.ndarray:
    is_table = hasattr(data, "column_names")
    columns = list(data.column_names if is_table else data[0])
    if label not in columns:
        raise ValueError(
            f"the data have no column {label!r} with labels, only {listing(columns)}."
            f"{nearest(label, columns)}"
        )
    values = data.with_format(None)[label][:] if is_table else [row[label] for row in data]
    labels = np.array([int(value) if value == int(value) else value for value in values])
    if labels.dtype.kind not in "iu":
        raise ValueError(f"column {label!r} holds {labels[0]!r}, not the numbers of classes")
    return labels


def _select(
    data: Any, rows: np.ndarray, outputs: np.ndarray, label: str, names: Sequence[str]
) -> Any:
    """Some rows, with the classifier's outputs as labels."""
    if not hasattr(data, "column_names"):
        pairs = zip(rows.tolist(), outputs.tolist(), strict=True)
        return [{**data[row], label: output} for row, output in pairs]
    feature = require("datasets").ClassLabel(names=list(names))
    # Numbered before they are chosen: the pictures of a data set with indices would be copied.
    every = np.zeros(len(data), dtype=int)
    every[rows] = outputs
    numbered = data.remove_columns(label).add_column(label, every, feature=feature)
    return numbered.select_columns(data.column_names).select(rows)

"""What is written beside the adapter of a finished task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftune.adapters.base.messages import listing
from graftune.integrations.class_incremental.metrics import METRICS, curve, metrics
from graftune.integrations.class_incremental.tasks import ClassOrder
from graftune.integrations.sharing.class_lists import RECORD, ClassListError
from graftune.integrations.training.whole import what_is_missing

_TASK = "task-"


@dataclass(frozen=True)
class TaskRecord:
    """How far a sequence of tasks has come.

    Args:
        order: the classes of the tasks so far, and the seed of their order.
        seed: of the training arguments.
        accuracies: in percent, one row a task: after task t on tasks 0 to t, among all classes so
            far.
        task_aware: the same among the classes of the image's own task; empty where not asked for.

    Example:
        >>> record = TaskRecord.read("out/task-9")
        >>> record.order.names, record.metrics["forgetting"]
    """

    order: ClassOrder
    seed: int
    accuracies: tuple[tuple[float, ...], ...] = ()
    task_aware: tuple[tuple[float, ...], ...] = ()

    @property
    def done(self) -> int:
        """The number of finished tasks."""
        return len(self.accuracies)

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of `METRICS`, of the task-agnostic accuracies."""
        return metrics(self.accuracies)

    def check(self, order: ClassOrder, place: object) -> None:
        """Check that tasks go on from this one.

        Raises:
            ClassListError: their first classes are others, or in another order.
        """
        if order.tasks[: self.done] != self.order.tasks:
            given = [name for names in order.tasks[: self.done] for name in names]
            raise ClassListError(
                f"the classifier in {place} has the classes {listing(self.order.names)} in "
                f"{self.done} tasks, and the first {self.done} tasks given here are of the classes "
                f"{listing(given)}; go on from its own order: "
                "TaskRecord.read(folder).order.then(...)"
            )

    def summary(self) -> str:
        """Return the matrix, a row a task, and what follows from it with its definition."""
        width = max(6, len(str(self.done)) + 5)
        lines = ["after" + "".join(f"{f'task {j}':>{width + 2}}" for j in range(self.done))]
        for task, row in enumerate(self.accuracies):
            lines.append(f"{task:<5}" + "".join(f"{value:{width + 2}.2f}" for value in row))
        for name, value in self.metrics.items():
            lines.append(f"{name} {value:.2f} % ({METRICS[name][1]})")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can say it."""
        return {
            "tasks": [list(names) for names in self.order.tasks],
            "order_seed": self.order.seed,
            "seed": self.seed,
            "accuracies": [list(row) for row in self.accuracies],
            "task_aware": [list(row) for row in self.task_aware],
            "curve": curve(self.accuracies),
            "metrics": self.metrics,
            "definitions": {name: words for name, (_, words) in METRICS.items()},
        }

    def write(self, folder: Path) -> None:
        """Write it into an adapter's folder."""
        (folder / RECORD).write_text(json.dumps(self.to_dict(), indent=2))

    @classmethod
    def read(cls, folder: str | Path) -> TaskRecord:
        """Read what is beside a saved adapter.

        Raises:
            FileNotFoundError: there is no record.
            ValueError: it cannot be read.
        """
        file = Path(folder) / RECORD
        if not file.is_file():
            raise FileNotFoundError(
                f"no {RECORD} in {str(folder)!r}: it is not the folder of a finished task, which "
                f"ClassIncrementalTrainer calls {_TASK}0, {_TASK}1 and so on"
            )
        try:
            said = json.loads(file.read_text())
            order = ClassOrder(tuple(map(tuple, said["tasks"])), said["order_seed"])
            rows = [tuple(map(tuple, said[name])) for name in ("accuracies", "task_aware")]
            return cls(order, said["seed"], *rows)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(file)!r} is not a record of tasks: {error}") from error


def task_folder(folder: Path, task: int) -> Path:
    """Return the folder of a finished task."""
    return folder / f"{_TASK}{task}"


def last_task(folder: Path) -> Path | None:
    """Return the folder of the last task that is whole, None if there is none."""
    whole = [path for path in _tasks(folder) if what_is_missing(path) is None]
    return max(whole, key=_number, default=None)


def _tasks(folder: Path) -> Iterator[Path]:
    for path in folder.glob(f"{_TASK}*"):
        if path.is_dir() and path.name.removeprefix(_TASK).isdigit():
            yield path


def _number(path: Path) -> int:
    return int(path.name.removeprefix(_TASK))

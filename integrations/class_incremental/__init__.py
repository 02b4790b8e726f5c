"""Class-incremental learning: data in tasks, a trainer of one task after the other, its metrics."""

from graftune.integrations.class_incremental.metrics import (
    METRICS,
    Matrix,
    backward_transfer,
    curve,
    curve_average,
    final_average_accuracy,
    forgetting,
    metrics,
)
from graftune.integrations.class_incremental.plots import draw_curves, draw_matrix
from graftune.integrations.class_incremental.record import TaskRecord
from graftune.integrations.class_incremental.tasks import ClassOrder, TaskSplit, split_tasks
from graftune.integrations.class_incremental.trainer import ClassIncrementalTrainer
from graftune.integrations.sharing.class_lists import ClassListError

__all__ = [
    "METRICS",
    "ClassIncrementalTrainer",
    "ClassListError",
    "ClassOrder",
    "Matrix",
    "TaskRecord",
    "TaskSplit",
    "backward_transfer",
    "curve",
    "curve_average",
    "draw_curves",
    "draw_matrix",
    "final_average_accuracy",
    "forgetting",
    "metrics",
    "split_tasks",
]

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

__all__ = [
    "METRICS",
    "Matrix",
    "backward_transfer",
    "curve",
    "curve_average",
    "final_average_accuracy",
    "forgetting",
    "metrics",
]

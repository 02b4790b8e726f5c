"""What objectives with labels share: cross entropy over the ones that count, and accuracy."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from graftune.adapters.base.precision import at_least_float32

IGNORED = -100  # the label that PyTorch and transformers leave out of a loss


def check_labels(labels: torch.Tensor, count: int, there_are: str, advice: str) -> None:
    """Check that labels are 0..count-1 or -100.

    Args:
        labels: integers, any shape.
        count: number of classes.
        there_are: where that number comes from, as in "there are 4 class names".
        advice: how to bring labels and classes together.

    Raises:
        ValueError: a label is out of range.
    """
    wrong = labels[((labels < 0) | (labels >= count)) & (labels != IGNORED)]
    if wrong.numel():
        raise ValueError(
            f"label {wrong[0].item()} is out of range: {there_are}, so labels are 0 to "
            f"{count - 1}, or {IGNORED} for what does not count; {advice}"
        )


def divided(total: torch.Tensor, items: torch.Tensor | int) -> torch.Tensor:
    """Return a loss summed over items, divided by their number, or by 1 where there are none."""
    count = torch.as_tensor(items, device=total.device)
    return total / (count + (count == 0))


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Return "loss", the cross entropy over the labels that count, and their "mask".

    It is computed in float32, or in float64 where the logits are.

    Args:
        logits: (..., C).
        labels: (...) in 0..C-1, or -100 for what does not count.
        num_items_in_batch: by what the sum is divided; default: the number of labels that count.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
    """
    labels = labels.to(logits.device)
    mask = labels != IGNORED
    total = F.cross_entropy(
        at_least_float32(logits).flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    items = mask.sum() if num_items_in_batch is None else num_items_in_batch
    return {"loss": divided(total, items), "mask": mask}


def accuracies(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the share of right answers, over pictures and averaged over classes.

    `balanced_accuracy` is the mean over the classes that occur of the accuracy within each.

    Args:
        logits: (N, C), the highest is the answer.
        labels: (N,) in 0..C-1; -100 is left out.

    Example:
        >>> accuracies(np.eye(2)[[0, 0, 0]], np.array([0, 0, 1]))
        {'accuracy': 0.6666666666666666, 'balanced_accuracy': 0.5}
    """
    kept = labels != IGNORED
    right = (logits.argmax(axis=-1) == labels)[kept].astype(float)
    labels = labels[kept]
    if not len(labels):
        return {"accuracy": float("nan"), "balanced_accuracy": float("nan")}
    by_class = [right[labels == label].mean() for label in np.unique(labels)]
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(np.mean(by_class))}

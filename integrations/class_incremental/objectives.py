"""Classification among the classes of one task, or of all so far, by a classifier that grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from graftune.integrations.objectives import ImageClassifier
from graftune.integrations.objectives.labels import (
    IGNORED,
    accuracies,
    cross_entropy,
)


def task_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    outputs: range,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Return "loss", the cross entropy with all other logits −∞, and "mask" (B,).

    Args:
        logits: of all classes, (B, C).
        labels: (B,), each in `outputs`; −100 does not count.
        outputs: the classes that the softmax is over.
        num_items_in_batch: by what the sum is divided; default: the number of labels that count.
        label_smoothing: share of the target that is spread over `outputs`, 0 to 1.

    Raises:
        ValueError: a label is not in `outputs`.
    """
    counts = labels != IGNORED
    own = torch.where(counts, labels - outputs.start, IGNORED).to(logits.device)
    wrong = labels[counts & ((labels < outputs.start) | (labels >= outputs.stop))]
    if wrong.numel():
        raise ValueError(
            f"label {wrong[0].item()} is out of range: the classes of this task are the outputs "
            f"{outputs.start} to {outputs.stop - 1}; split the data by the order of the classes, "
            "which numbers them by their outputs"
        )
    chosen = logits[:, outputs.start : outputs.stop]  # (B, classes of the task)
    return cross_entropy(chosen, own, num_items_in_batch, label_smoothing)


class TaskClassifier(ImageClassifier):
    """Classify images among some of a model's outputs: the loss is `task_loss`.

    Args:
        outputs: the classes that the softmax is over: those of the task in training, all so far in
            evaluation. Logits are returned of the classes up to the last of them.
        label_smoothing: 0 to 1.
        head: as `ImageClassifier` takes it.

    Example:
        >>> objective = TaskClassifier(order.outputs(1))
        >>> objective(model, pixel_values=pixels, labels=labels)["loss"].backward()
    """

    def __init__(
        self, outputs: range, label_smoothing: float = 0.0, head: str | None = None
    ) -> None:
        super().__init__(label_smoothing, head)
        self.outputs = outputs

    def forward(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        features: bool = False,
    ) -> dict[str, Any]:
        """Return logits (B, last output + 1), and what else `ImageClassifier` does."""
        result = super().forward(model, pixel_values, features=features)
        result["logits"] = result["logits"][:, : self.outputs.stop]
        if labels is None:
            return result
        smoothing = self.label_smoothing
        return result | task_loss(
            result["logits"], labels, self.outputs, num_items_in_batch, smoothing
        )


class CachedClassifier(nn.Module):
    """Classify features that were kept, by a classifier alone: the loss is `task_loss`.

    Args:
        outputs: the classes that the softmax is over.
        label_smoothing: 0 to 1.

    Example:
        >>> objective = CachedClassifier(range(2, 4))
        >>> objective(torch.nn.Linear(8, 4), cached=features, labels=labels)["loss"].backward()
    """

    def __init__(self, outputs: range, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.outputs = outputs
        self.label_smoothing = label_smoothing

    def forward(
        self,
        model: nn.Module,
        cached: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, Any]:
        """Return logits (B, C), loss and mask (B,) of what entered the classifier, (B, D)."""
        logits = model(cached)
        losses = task_loss(logits, labels, self.outputs, num_items_in_batch, self.label_smoothing)
        return {"logits": logits, **losses}

    def items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the number of labels in a batch."""
        return (batch["labels"] != IGNORED).sum()


def percent_right(logits: np.ndarray, labels: np.ndarray, outputs: range | None = None) -> float:
    """Return the accuracy in percent, among all classes or among some.

    Args:
        logits: (N, C).
        labels: (N,); −100 is left out.
        outputs: the classes that can be answered, where the task is known.

    Example:
        >>> percent_right(np.eye(3)[[0, 0]], np.array([0, 2])), percent_right(
        ...     np.eye(3)[[0, 0]], np.array([1, 2]), range(1, 3)
        ... )
        (50.0, 50.0)
    """
    if outputs is not None:
        allowed = np.isin(np.arange(logits.shape[-1]), list(outputs))
        logits = np.where(allowed, logits, -np.inf)
    return 100 * accuracies(logits, labels)["accuracy"]

"""Classification of images by a model that has one output a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from graftune.adapters.base.messages import listing, nearest
from graftune.integrations.objectives import taps
from graftune.integrations.objectives.labels import (
    IGNORED,
    accuracies,
    check_labels,
    cross_entropy,
)
from graftune.integrations.objectives.unwrap import base_of, tensor_of

# Where transformers and torchvision keep what turns pooled features into logits.
_HEADS = ("classifier", "fc", "head", "heads")
_MORE_OUTPUTS = "build the model with one output a class: num_labels, or num_classes in timm"


def find_head(model: nn.Module, name: str | None = None) -> nn.Module | None:
    """Return the module that turns a model's pooled features into logits.

    Args:
        model: a model of transformers, timm or torchvision, or any other, wrapped or not.
        name: the module's name in the unwrapped model; None: where these libraries keep it.

    Returns:
        The module, or None where no name is given and none of the usual ones is a single module.

    Raises:
        ValueError: the model has no module of the given name.
    """
    base = base_of(model)
    if name is not None:
        modules = dict(base.named_modules())
        if name not in modules:
            raise ValueError(
                f"{type(base).__name__} has no module {name!r} to take as head."
                f"{nearest(name, modules)}"
            )
        return modules[name]
    timm = [base.get_classifier()] if hasattr(base, "get_classifier") else []
    found = [*timm, *(getattr(base, head, None) for head in _HEADS)]
    return next((module for module in found if isinstance(module, nn.Module)), None)


class ImageClassifier(nn.Module):
    """Classify images by the model's own outputs, one a class.

    loss = mean over i of −Σ_c q[i, c] · log softmax(logits[i])[c], where q[i] is (1 − ε) at the
    label plus ε / C everywhere, ε the label smoothing (Szegedy et al., arXiv 1512.00567, section
    7). It owns no weights. "features" has "image", what enters the model's head: (B, D).

    Args:
        label_smoothing: ε, 0 to 1.
        head: name of the module that turns pooled features into logits, in the unwrapped model;
            needed for the features of models that do not come from transformers, timm or
            torchvision.

    Raises:
        ValueError: label smoothing out of range; when called, labels out of range, or features of
            a model whose head is not found.
        TypeError: when called, the model returns no logits.

    Example:
        >>> objective = ImageClassifier(label_smoothing=0.1)
        >>> objective(timm_model, pixel_values=pixels, labels=labels)["loss"].backward()
    """

    def __init__(self, label_smoothing: float = 0.0, head: str | None = None) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be between 0 and 1")
        self.label_smoothing = label_smoothing
        self.head = head

    def forward(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        features: bool = False,
    ) -> dict[str, Any]:
        """Return logits (B, C), with labels the loss and the mask (B,), and features if asked for.

        Args:
            model: maps pixels to logits; as it comes from DDP, FSDP, torch.compile or PEFT.
            pixel_values: preprocessed images, (B, channels, height, width).
            labels: (B,) in 0..C-1; -100 is left out of the loss.
            num_items_in_batch: by what the summed loss is divided; default: the number of labels.
            features: return what enters the head as well.
        """
        tap = taps.tap_input(self._head(model, features))
        with tap.switched(features):
            if isinstance(base_of(model), PreTrainedModel):
                output = model(pixel_values=pixel_values)
            else:
                output = model(pixel_values)
        logits = tensor_of(output, "logits", model)
        result: dict[str, Any] = {"logits": logits}
        if features:
            entered = tap.take()  # (B, D), of some convolutional networks (B, D, 1, 1)
            result["features"] = {"image": entered.mean((2, 3)) if entered.ndim == 4 else entered}
        if labels is not None:
            count = logits.shape[-1]
            check_labels(labels, count, f"the model has {count} outputs", _MORE_OUTPUTS)
            result |= cross_entropy(logits, labels, num_items_in_batch, self.label_smoothing)
        return result

    def items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the number of labels in a batch."""
        return (batch["labels"] != IGNORED).sum()

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return accuracy and class-balanced accuracy of logits (N, C) against labels (N,)."""
        return accuracies(predictions, labels)

    def _head(self, model: nn.Module, needed: bool) -> nn.Module | None:
        head = find_head(model, self.head)
        if head is None and needed:
            raise ValueError(
                f"{type(base_of(model)).__name__} has no head that is one module called "
                f"{listing(_HEADS)}; for its features name the module that turns pooled features "
                "into logits: ImageClassifier(head=...)"
            )
        return head

"""Mask norm: the scores of a tuned mask stay small (R-AMT)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftune.adapters.base.precision import at_least_float32
from graftune.adapters.base.sharded import check_trained_weights, whole
from graftune.adapters.regularizers.base import Regularizer, Run, Step

PREFIX = "mask_tuning_"


def mask_norm(scores: Iterable[Tensor]) -> Tensor:
    """Return Σ ‖m‖₂ over mask tensors, in float32 or better.

    Regularized Mask Tuning (arXiv 2307.15049), as its released code computes it: the norm of each
    tensor, neither squared nor divided by anything.

    Args:
        scores: m, one tensor of any shape for each masked weight.

    Example:
        >>> mask_norm([torch.tensor([3.0, 4.0]), torch.ones(2, 2)])
        tensor(7.)
    """
    return torch.stack([whole(torch.linalg.vector_norm(at_least_float32(m))) for m in scores]).sum()


@dataclass
class MaskNorm(Regularizer):
    """Keep the scores of tuned masks small: λ · Σ ‖m‖₂, as `mask_norm` sums it.

    The scores are the trained parameters whose name begins with `mask_tuning_`. Its gradient joins
    that of the task; `GradientDropout` says how the two meet.

    Args:
        weight: λ ≥ 0.

    Raises:
        ValueError: λ < 0; before training, scores that are empty in this process.
        TypeError: before training, the model has no masks that are trained.

    Example:
        >>> regularizers = [GradientDropout(0.3), MaskNorm(1e-4)]
        >>> model = graftune.wrap(clip, "mask_tuning", regularizers=regularizers)
    """

    name: ClassVar[str] = "mask_norm"
    reads_outputs: ClassVar[bool] = False
    weight: float = field(default=1e-4, metadata={"help": "λ, the weight of the term."})

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must be at least 0, got {self.weight!r}")

    def check(self, model: nn.Module) -> None:
        """Raise when there are no masks, or they are not here."""
        check_trained_weights(model, "MaskNorm measures weights")
        if not _scores(model):
            raise TypeError(
                "MaskNorm needs masks that are trained, and the model has no trained parameter "
                f"whose name begins with {PREFIX!r}; wrap it with 'mask_tuning', or leave MaskNorm "
                "out (L2ToStart measures any adapter)"
            )

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term, without anything of the batch."""
        return {self.name: self.weight * mask_norm(_scores(step.model).values())}


def _scores(model: nn.Module) -> dict[str, nn.Parameter]:
    trained = Run(model, steps=0, epochs=0).trained()
    return {name: p for name, p in trained.items() if f".{PREFIX}" in f".{name}"}

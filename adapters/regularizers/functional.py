"""The mathematics of the regularizers, as pure functions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graftune.adapters.base.precision import at_least_float32


def distillation(logits: Tensor, frozen_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² · KL(softmax(z₀ / T) ‖ softmax(z / T)) of each position.

    The soft targets of Distilling the Knowledge in a Neural Network (arXiv 1503.02531, section 2),
    whose factor T² keeps the gradient's size the same for every T.

    Args:
        logits: z, (..., C).
        frozen_logits: z₀, (..., C).
        temperature: T > 0.

    Returns:
        (...), at least 0.

    Example:
        >>> distillation(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor([0., 0.])
    """
    log_p = F.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    log_q = F.log_softmax(at_least_float32(frozen_logits) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def squared_distance(values: Tensor, frozen_values: Tensor) -> Tensor:
    """Return the mean over the last axis of (v − v₀)², for each position: (..., D) to (...)."""
    return (at_least_float32(values) - at_least_float32(frozen_values)).square().mean(-1)

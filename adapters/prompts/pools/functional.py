"""The mathematics of prompt pools: how alike queries and keys are, and what is made of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def similarities(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the cosine of each query with each key: (B, W) and (M, W) to (B, M).

    Example:
        >>> similarities(torch.tensor([[2.0, 0.0]]), torch.eye(2))
        tensor([[1., 0.]])
    """
    return F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T


def component_weights(queries: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """Return α_m = cos(q ⊙ A_m, K_m), how much of each component goes into a prompt.

    CODA-Prompt (arXiv 2211.13218, equation 4).

    Args:
        queries: q, (B, W).
        attention: A, (M, W).
        keys: K, (M, W).

    Returns:
        (B, M).
    """
    attended = F.normalize(queries[:, None] * attention, dim=-1)  # (B, M, W)
    return torch.einsum("bmw,mw->bm", attended, F.normalize(keys, dim=-1))


def orthogonality(rows: Tensor) -> Tensor:
    """Return the mean square of the entries of R Rᵀ − I: (M, ...) to a number.

    CODA-Prompt (arXiv 2211.13218, equation 6), as its released code takes the mean.

    Example:
        >>> orthogonality(torch.eye(3))
        tensor(0.)
    """
    rows = rows.flatten(1)
    identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return (rows @ rows.T - identity).square().mean()


def grown(rows: Tensor, first: int, last: int) -> Tensor:
    """Return rows 0..last−1, of which those before `first` get no gradient."""
    return torch.cat([rows[:first].detach(), rows[first:last]])

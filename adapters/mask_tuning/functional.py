"""The mathematics of mask tuning: binary masks on weights, trained straight through a threshold.

A weight W has a score m for each entry (or for the most important ones) and is used as

    W ⊙ 1[m > τ]

(Regularized Mask Tuning, arXiv 2307.15049, section 3.1). The step has no useful gradient; the
gradient of the mask is handed to the score as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Binarize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, threshold: float) -> Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _MaskedWeight(torch.autograd.Function):
    """W ⊙ 1[m > τ] in one pass, with nothing kept for the backward pass but W and m themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
        return torch.where(scores > threshold, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, scores, ctx.threshold = inputs
        ctx.save_for_backward(weight, scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, scores = ctx.saved_tensors
        (grad,) = grads
        of_weight = of_scores = None
        if ctx.needs_input_grad[0]:
            of_weight = torch.where(scores > ctx.threshold, grad, 0)
        if ctx.needs_input_grad[1]:
            of_scores = grad.to(scores.dtype) * weight
        return of_weight, of_scores, None


def binarize(scores: Tensor, threshold: float) -> Tensor:
    """Return 1[m > τ], whose gradient reaches m unchanged (straight through).

    Args:
        scores: m, of any shape.
        threshold: τ; a score that equals it is masked.

    Returns:
        Zeros and ones of the scores' shape and dtype.

    Example:
        >>> binarize(torch.tensor([0.0, 0.005, 0.01]), 0.005)
        tensor([0., 0., 1.])
    """
    return _Binarize.apply(scores, threshold)


def masked_weight(
    weight: Tensor, scores: Tensor, threshold: float, index: Tensor | None = None
) -> Tensor:
    """Return W ⊙ 1[m > τ]; ∂/∂m = ∂/∂(W ⊙ mask) ⊙ W at every scored entry, masked or not.

    Regularized Mask Tuning (arXiv 2307.15049, equations 2 and 3).

    Args:
        weight: W, of any shape.
        scores: m, of W's shape, or (K,) for the entries that `index` names.
        threshold: τ; a score that equals it is masked.
        index: (K,) positions in the flattened W, increasing, int32 or int64; the other entries
            stay as they are. None: all of them have scores.

    Returns:
        The masked weight in W's shape and dtype.

    Example:
        >>> masked_weight(torch.tensor([1.0, 2.0]), torch.tensor([0.01, 0.0]), 0.005)
        tensor([1., 0.])
    """
    if index is None:
        return _MaskedWeight.apply(weight, scores, threshold)
    flat = weight.reshape(-1)
    kept = _MaskedWeight.apply(flat.index_select(0, index), scores, threshold)  # (K,)
    return flat.index_copy(0, index.long(), kept).view(weight.shape)


def mask_of(
    scores: Tensor, threshold: float, shape: torch.Size | tuple[int, ...], index: Tensor | None
) -> Tensor:
    """Return the mask as booleans in the weight's shape: False where the weight is masked."""
    kept = scores.detach() > threshold
    if index is None:
        return kept
    mask = torch.ones(shape, dtype=torch.bool, device=scores.device)
    mask.view(-1)[index.long()] = kept
    return mask


def scores_of(mask: Tensor, init: float, threshold: float, dtype: torch.dtype) -> Tensor:
    """Return scores that give a mask: m₀ where it is one, 2τ − m₀ where it is zero.

    Both lie equally far from τ, so that training can go on in either direction: what a file of
    bits holds of the scores is no more than their side.

    Args:
        mask: booleans of any shape.
        init: m₀, the value of a fresh score.
        threshold: τ < m₀.
        dtype: of the scores.
    """
    low = torch.tensor(2 * threshold - init, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.tensor(init, dtype=dtype, device=mask.device), low)


def random_mask(shape: tuple[int, ...]) -> Tensor:
    """Return a random mask of which a quarter, and at least one entry, is zero: for tests."""
    mask = torch.ones(shape, dtype=torch.bool)
    zeros = torch.randperm(mask.numel())[: max(1, mask.numel() // 4)]
    mask.view(-1)[zeros] = False
    return mask

"""Prompts in a sequence of tokens: put in, replaced, taken out (PromptSRC, arXiv 2307.06948)."""

from __future__ import annotations

import torch
from torch import Tensor


def replace_tokens(hidden: Tensor, prompts: Tensor, start: int) -> Tensor:
    """Return a sequence in which the tokens from `start` on are prompts.

    Args:
        hidden: (B, L, D).
        prompts: (n, D); n tokens are replaced, so L ≥ start + n.
        start: position of the first of them.

    Returns:
        (B, L, D), in the dtype of `hidden`.

    Example:
        >>> replace_tokens(torch.zeros(1, 4, 2), torch.ones(2, 2), start=1)[0, :, 0]
        tensor([0., 1., 1., 0.])
    """
    stop = start + prompts.shape[0]
    return torch.cat([hidden[:, :start], _rows(hidden, prompts), hidden[:, stop:]], dim=1)


def append_tokens(hidden: Tensor, prompts: Tensor) -> Tensor:
    """Return a sequence with prompts at its end: (B, L, D) and (n, D) to (B, L + n, D)."""
    return torch.cat([hidden, _rows(hidden, prompts)], dim=1)


def replace_last(hidden: Tensor, prompts: Tensor) -> Tensor:
    """Return a sequence whose last n tokens are prompts: (B, L + n, D) and (n, D) to (B, L + n, D).

    Example:
        >>> replace_last(torch.zeros(1, 3, 1), torch.ones(1, 1)).flatten()
        tensor([0., 0., 1.])
    """
    return append_tokens(hidden[:, : -prompts.shape[0]], prompts)


def _rows(hidden: Tensor, prompts: Tensor) -> Tensor:
    """The prompts, once for each row of the batch: (n, D) to (B, n, D)."""
    return prompts.to(hidden.dtype).expand(hidden.shape[0], -1, -1)

"""Learning rates that change from epoch to epoch, as the papers of prompt and mask tuning train."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_rates(epochs: int, rate: float, warmup_rate: float | None = None) -> list[float]:
    """Return η_e = η · (1 + cos(π e / E)) / 2 for the epochs e = 0..E−1.

    With a warm-up, epoch 0 has its own rate and the cosine starts with epoch 1, so that the last
    epoch does not reach its end: η_e = η · (1 + cos(π (e − 1) / E)) / 2 (as the code of PromptSRC,
    arXiv 2307.06948, trains).

    Args:
        epochs: E ≥ 1.
        rate: η > 0.
        warmup_rate: the rate of epoch 0; None starts with η.

    Raises:
        ValueError: E < 1.

    Example:
        >>> cosine_rates(3, 0.0025, warmup_rate=1e-5)[:2]
        [1e-05, 0.0025]
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    first = [] if warmup_rate is None else [warmup_rate]
    counts = range(epochs - len(first))
    return first + [rate * (1 + math.cos(math.pi * count / epochs)) / 2 for count in counts]


def quarter_cosine_rates(epochs: int, rate: float) -> list[float]:
    """Return η_e = η · cos(0.99 · π/2 · e / (E − 1)) for the epochs e = 0..E−1.

    Slow at first, then down to a hundredth part of a quarter turn above 0: the rates of a task in
    class-incremental learning (CODA-Prompt, arXiv 2211.13218, and OVOR, arXiv 2402.04129). The
    authors' released code has each rate one epoch late, so that the first occurs twice.

    Args:
        epochs: E ≥ 1.
        rate: η > 0.

    Raises:
        ValueError: E < 1.

    Example:
        >>> [round(rate, 4) for rate in quarter_cosine_rates(3, 1.0)]
        [1.0, 0.7127, 0.0157]
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    turn = 0.99 * math.pi / 2 / max(epochs - 1, 1)
    return [rate * math.cos(turn * epoch) for epoch in range(epochs)]


def epoch_schedule(optimizer: Optimizer, rates: Sequence[float], steps_per_epoch: int) -> LambdaLR:
    """Return a scheduler, stepped once an optimizer step, that gives each epoch its rate.

    Args:
        optimizer: with one learning rate for all groups.
        rates: one for each epoch; the last one stays.
        steps_per_epoch: optimizer steps of an epoch, at least 1.

    Example:
        >>> optimizer = torch.optim.SGD(parameters, lr=0.0025, momentum=0.9, weight_decay=5e-4)
        >>> schedule = epoch_schedule(optimizer, cosine_rates(20, 0.0025, 1e-5), 100)
        >>> graftune.Trainer(model, args, optimizers=(optimizer, schedule), ...)
    """
    base = optimizer.param_groups[0]["lr"]
    factors = [rate / base for rate in rates]
    return LambdaLR(optimizer, lambda step: factors[min(step // steps_per_epoch, len(rates) - 1)])

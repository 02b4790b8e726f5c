"""Gaussian averaging: the adapter is a weighted mean of its trajectory (PromptSRC)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftune.adapters.base.sharded import check_trained_weights, spread_like
from graftune.adapters.regularizers.base import Regularizer, Run, State


def gaussian_weights(epochs: int, mean: float, std: float) -> Tensor:
    """Return w_e ∝ exp(−(e − μ)² / 2σ²) for the epochs e = 1..N, which sum to 1.

    Self-regulating Prompts (arXiv 2307.06948, section 3.2, Gaussian weighted prompt aggregation).

    Args:
        epochs: N ≥ 1.
        mean: μ, the epoch that counts most.
        std: σ > 0, in epochs.

    Returns:
        (N,), in float64.

    Raises:
        ValueError: N < 1 or σ ≤ 0.

    Example:
        >>> gaussian_weights(3, mean=2, std=1)
        tensor([0.2741, 0.4519, 0.2741], dtype=torch.float64)
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not std > 0:
        raise ValueError(f"std must be greater than 0, got {std}")
    epoch = torch.arange(1, epochs + 1, dtype=torch.float64)
    # A softmax of exponents does not vanish where all densities are too small to write down.
    return torch.softmax(-((epoch - mean) ** 2) / (2 * std**2), dim=0)


@dataclass
class GaussianAveraging(Regularizer):
    """Replace the adapter, at the end, by a Gaussian-weighted mean over its epochs.

    θ̄ = Σ_e w_e θ_e with the weights of `gaussian_weights` and θ_e the trained weights after epoch e
    (arXiv 2307.06948, section 3.2). Early epochs, not yet learned, and late ones, overfitted, count
    less. Only the adapter's weights are averaged, in float64; training itself is not changed.

    Args:
        mean: μ, in epochs.
        std: σ > 0, in epochs.

    Raises:
        ValueError: σ ≤ 0; before training, weights that are empty in this process.

    Example:
        >>> model = graftune.wrap(clip, LoraConfig(), regularizers=[GaussianAveraging(15, 1)])
    """

    name: ClassVar[str] = "gaussian_averaging"
    mean: float = field(default=15.0, metadata={"help": "The epoch that counts most."})
    std: float = field(default=1.0, metadata={"help": "Width of the Gaussian, in epochs."})

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"`std` must be greater than 0, got {self.std!r}")
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0  # what the sums' weights add up to

    def check(self, model: nn.Module) -> None:
        """Raise when the weights are not here."""
        check_trained_weights(model, "GaussianAveraging averages weights")

    def start(self, run: Run) -> None:
        """Start an empty sum."""
        self._sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in run.trained().items()}
        self._weight = 0.0

    @torch.no_grad()
    def epoch_end(self, run: Run, epoch: int) -> None:
        """Add the epoch's weights to the sum."""
        weights = gaussian_weights(max(run.epochs, epoch), self.mean, self.std)
        weight = weights[epoch - 1].item()
        for name, parameter in run.trained().items():
            self._sums[name] += weight * parameter.double()
        self._weight += weight

    @torch.no_grad()
    def end(self, run: Run) -> None:
        """Put the mean into the adapter: over all epochs, or those there were."""
        if self._weight == 0:
            return
        for name, parameter in run.trained().items():
            parameter.copy_(self._sums[name] / self._weight)

    def state_dict(self) -> State:
        """Return the sum so far."""
        return {"weight": self._weight, "sums": dict(self._sums)}

    def load_state_dict(self, state: State) -> None:
        """Go on with a sum."""
        self._weight = state["weight"]
        for name, total in self._sums.items():
            self._sums[name] = spread_like(state["sums"][name], total)

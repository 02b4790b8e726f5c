"""L2-SP: a weight decay towards where the adapter started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftune.adapters.base.precision import at_least_float32
from graftune.adapters.base.sharded import check_trained_weights, spread_like, whole
from graftune.adapters.base.weights import weight_changes
from graftune.adapters.regularizers.base import Regularizer, Run, State, Step


def l2_to_start(weights: Iterable[Tensor], starts: Iterable[Tensor]) -> Tensor:
    """Return ½ Σ ‖w − w₀‖², in float32 or better.

    Explicit Inductive Bias for Transfer Learning with Convolutional Networks (arXiv 1802.01483,
    equation 2, with all weights of the adapter as w and their values at the start as w₀).

    Example:
        >>> l2_to_start([torch.ones(2)], [torch.zeros(2)])
        tensor(1.)
    """
    return _sum((w - start).square().sum() for w, start in zip(weights, starts, strict=True)) / 2


@dataclass
class L2ToStart(Regularizer):
    """Keep weights near their start: λ/2 · Σ‖θ − θ₀‖² or λ/2 · Σ‖ΔW‖².

    The first, L2-SP (arXiv 1802.01483, equation 2), is about the adapter's own weights θ and their
    values θ₀ when training began. The second is about what the adapter does to the base model: the
    distance of the merged weights W + ΔW to W, in the weights' own space.

    Args:
        weight: λ ≥ 0.
        of: "adapter" for θ, "merged" for ΔW, which needs a method that adds to the weights; one
            dense ΔW at a time exists.

    Raises:
        ValueError: a setting is out of range.
        TypeError: before training, "merged" with a method that has no ΔW, or an adapter without any
            weight change.

    Example:
        >>> model = graftune.wrap(clip, "flora", regularizers=[L2ToStart(1e-3, of="merged")])
    """

    name: ClassVar[str] = "l2_to_start"
    reads_outputs: ClassVar[bool] = False
    weight: float = field(default=1e-3, metadata={"help": "λ, the weight of the term."})
    of: Literal["adapter", "merged"] = field(
        default="adapter",
        metadata={"help": "'adapter': its own weights; 'merged': what it adds to the base's."},
    )

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must be at least 0, got {self.weight!r}")
        if self.of not in ("adapter", "merged"):
            raise ValueError(f"`of` is 'adapter' or 'merged', got {self.of!r}")
        self._starts: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        """Raise when the method has no ΔW to measure, or the weights are not here."""
        check_trained_weights(model, "L2ToStart measures weights")
        if self.of == "merged" and not list(weight_changes(model)):
            raise TypeError(
                "L2ToStart(of='merged') needs an adapter that changes weights, and the active one "
                "does not; use of='adapter'"
            )

    def start(self, run: Run) -> None:
        """Note the trained weights."""
        if self.of == "adapter":
            self._starts = {name: p.detach().clone() for name, p in run.trained().items()}

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term, without anything of the batch."""
        if self.of == "merged":
            changes = weight_changes(step.model)
            # Recomputed in the backward pass, so that no dense ΔW waits for it.
            squares = (checkpoint(_half_square, c, use_reentrant=False) for _, c in changes)
            return {self.name: self.weight * _sum(squares)}
        weights = dict(step.model.named_parameters())
        # Between forward and backward FSDP may hold some of its sharded weights whole.
        starts = {name: spread_like(start, weights[name]) for name, start in self._starts.items()}
        distance = l2_to_start((weights[name] for name in starts), starts.values())
        return {self.name: self.weight * distance}

    def state_dict(self) -> State:
        """Return the weights at the start of the run."""
        return dict(self._starts)

    def load_state_dict(self, state: State) -> None:
        """Take the weights at the start of the run, in the place of those at its resumption."""
        for name, start in self._starts.items():
            self._starts[name] = spread_like(state[name], start)


def _half_square(change: Any) -> Tensor:
    return at_least_float32(change()).square().sum() / 2


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([whole(value) for value in values]).sum()

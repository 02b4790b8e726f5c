"""The loss terms that belong to prompt pools: keys that match, components that are orthogonal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftune.adapters.prompts.pools import CodaPromptConfig, DualPromptConfig, L2PConfig, PoolLayer
from graftune.adapters.regularizers.base import Regularizer, Step


@dataclass
class KeyMatching(Regularizer):
    """Pull the keys of chosen prompts towards the images: λ · mean of Σ (1 − cos(q, k)).

    Of L2P the sum is over the keys of the chosen prompts (arXiv 2112.08654, equation 5), of
    DualPrompt over the key of the current task in each block (arXiv 2204.04799, equation 4). q is
    the frozen model's feature of an image. Keys learn from this term alone.

    Args:
        weight: λ ≥ 0; 0.5 in L2P, 1 in DualPrompt.

    Raises:
        ValueError: λ < 0.
        TypeError: before training, no pool with keys that are to match.

    Example:
        >>> model = graftune.wrap(vit, L2PConfig(), regularizers=[KeyMatching(0.5)])
    """

    name: ClassVar[str] = "key_matching"
    weight: float = field(default=1.0, metadata={"help": "λ, the weight of the term."})

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def check(self, model: nn.Module) -> None:
        """Raise when there are no keys to match."""
        _check_pool(self, model, (L2PConfig, DualPromptConfig))

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term, of the images that the adapted model saw last."""
        distances = [layer.matching for layer in _layers(step.model)]
        per_image = torch.stack([d for d in distances if d is not None]).sum(0)  # (B,)
        mask = step.outputs.get("mask")
        if mask is not None and mask.shape != per_image.shape:
            mask = None
        return {self.name: self.weight * step.mean(per_image, mask)}


@dataclass
class PromptOrthogonality(Regularizer):
    """Keep the components of CODA-Prompt apart: λ · Σ mean (R Rᵀ − I)².

    R are the components, the keys and the attention of the tasks so far, in each block (arXiv
    2211.13218, equation 6; λ = 0.1).

    Args:
        weight: λ ≥ 0.

    Raises:
        ValueError: λ < 0.
        TypeError: before training, no CODA-Prompt.

    Example:
        >>> model = graftune.wrap(vit, CodaPromptConfig(), regularizers=[PromptOrthogonality()])
    """

    name: ClassVar[str] = "prompt_orthogonality"
    reads_outputs: ClassVar[bool] = False
    weight: float = field(default=0.1, metadata={"help": "λ, the weight of the term."})

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def check(self, model: nn.Module) -> None:
        """Raise when there are no components."""
        _check_pool(self, model, (CodaPromptConfig,))

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term, without anything of the batch."""
        of_blocks = [layer.orthogonality() for layer in _layers(step.model)]
        total = torch.stack([value for value in of_blocks if value is not None]).sum()
        return {self.name: self.weight * total}


def _layers(model: nn.Module) -> Iterator[PoolLayer]:
    """The layers of pools that have prompts of the active adapter."""
    for module in model.modules():
        if isinstance(module, PoolLayer) and module.current() is not None:
            yield module


def _check_weight(weight: float) -> None:
    if not weight >= 0:
        raise ValueError(f"`weight` must be at least 0, got {weight!r}")


def _check_pool(regularizer: Regularizer, model: nn.Module, configs: tuple[type, ...]) -> None:
    config = getattr(model, "active_peft_config", None)
    parts = getattr(config, "parts", None) or [config]
    if not any(isinstance(part, configs) for part in parts):
        names = " or ".join(each.__name__ for each in configs)
        raise TypeError(
            f"{type(regularizer).__name__} is about the prompts of {names}, and the active adapter "
            f"is of {type(config).__name__}: leave it out"
        )

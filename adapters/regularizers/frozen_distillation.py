"""Distillation from the frozen model: what the base model says of a batch stays said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graftune.adapters.regularizers.base import Need, Regularizer, Step
from graftune.adapters.regularizers.functional import distillation, squared_distance


@dataclass
class FrozenDistillation(Regularizer):
    """Keep what the adapted model computes near what its base model computes on the same batch.

    λ · mean over positions of T² · KL(softmax(z₀/T) ‖ softmax(z/T)) of the logits (arXiv
    1503.02531, section 2; towards the old model: Learning without Forgetting, arXiv 1606.09282), or
    λ · the mean squared distance of the outputs or the features. The frozen model is the adapted
    one with its adapter off (`graftune.adapters.base.frozen.frozen_base`).

    Args:
        weight: λ ≥ 0.
        of: "logits" for class or token probabilities; "outputs" for the same tensor compared by its
            values, as of a denoiser; "features" for every tensor that the objective returns as
            features, such as CLIP's image and text features or a language model's hidden states.
        temperature: T > 0, for "logits".

    Raises:
        ValueError: a setting is out of range; in training, the objective returns no logits or no
            features.

    Example:
        >>> model = graftune.wrap(llm, "flora", regularizers=[FrozenDistillation(0.5)])
    """

    name: ClassVar[str] = "frozen_distillation"
    weight: float = field(default=1.0, metadata={"help": "λ, the weight of the term."})
    of: Literal["logits", "outputs", "features"] = field(
        default="logits",
        metadata={"help": "'logits' (KL), or 'outputs' or 'features' (squared distance)."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "T, by which logits are divided before the softmax."}
    )

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must be at least 0, got {self.weight!r}")
        if self.of not in ("logits", "outputs", "features"):
            raise ValueError(f"`of` is 'logits', 'outputs' or 'features', got {self.of!r}")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be greater than 0, got {self.temperature!r}")

    @property
    def needs(self) -> frozenset[Need]:
        """The frozen model's outputs, and features where they are compared."""
        return frozenset({Need.FROZEN} | ({Need.FEATURES} if self.of == "features" else set()))

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Return the term: one for logits or outputs, one for each feature."""
        assert step.frozen is not None
        if self.of == "features":
            return {
                f"{self.name}_{name}": self.weight * mean
                for name, mean in _feature_distances(step).items()
            }
        if self.of == "logits":
            mean = frozen_divergence(step, self.temperature, type(self).__name__)
        else:
            frozen_outputs = _of(step.frozen, "logits")
            mean = _mean(step, squared_distance(_of(step.outputs, "logits"), frozen_outputs))
        return {self.name: self.weight * mean}


def frozen_divergence(step: Step, temperature: float, asked_by: str) -> Tensor:
    """Return T² · KL(softmax(z₀/T) ‖ softmax(z/T)), the mean over the positions that count.

    Args:
        step: with the frozen model's outputs.
        temperature: T > 0.
        asked_by: the regularizer, for the error.

    Raises:
        ValueError: the objective returns no logits.
    """
    assert step.frozen is not None
    logits = _of(step.outputs, "logits", asked_by)
    frozen_logits = _of(step.frozen, "logits", asked_by)
    return _mean(step, distillation(logits, frozen_logits, temperature))


def _feature_distances(step: Step) -> dict[str, Tensor]:
    assert step.frozen is not None
    features, frozen = _of(step.outputs, "features"), _of(step.frozen, "features")
    of_classes = getattr(step.objective, "features_of_classes", ())
    distances = {name: squared_distance(value, frozen[name]) for name, value in features.items()}
    return {
        name: values.mean() if name in of_classes else _mean(step, values)
        for name, values in distances.items()
    }


def _mean(step: Step, values: Tensor) -> Tensor:
    """The mean over the positions that count, where these are positions of the values."""
    mask = step.outputs.get("mask")
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return step.mean(values, mask)


def _of(outputs: Mapping[str, Any], name: str, asked_by: str = FrozenDistillation.__name__) -> Any:
    value = outputs.get(name)
    if value is None or (torch.is_tensor(value) and not value.numel()):
        raise ValueError(
            f"{asked_by} needs {name!r}, and the objective returned only "
            f"{sorted(key for key, v in outputs.items() if v is not None)}; see "
            "graftune.integrations.objectives for what an objective returns. Losses that never "
            "compute logits have to be switched off: use_liger_kernel=False, or "
            "liger_kernel_config={'fused_linear_cross_entropy': False}"
        )
    return value

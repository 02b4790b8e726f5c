"""The config of mask tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graftune.adapters.base.config import WeightConfig
from graftune.adapters.base.registration import add_peft_type

MASK_TUNING = add_peft_type("MASK_TUNING")


@dataclass
class MaskTuningConfig(WeightConfig):
    """Config of mask tuning, which uses a weight W as W ⊙ 1[m > τ] and trains the scores m.

    Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models
    (ICCV 2023, arXiv 2307.15049). Only weights are masked: biases, norms and embeddings stay as
    they are unless `target_parameters` names them.

    Args:
        targets: what `graftune.wrap` looks for in the model: "attention" (the patch embedding and
            each block's attention projections; in a convolutional network all convolutions and the
            attention pool), "attention+mlp", "all", or names and patterns as in `target_modules`.
            In a CLIP that is its vision tower. It fills `target_modules`.
        init: the scores' first value, above `threshold`: nothing is masked at the start.
        threshold: τ; a weight whose score is not above it is masked.
        fraction: in (0, 1): only the most important share of each tensor gets scores, chosen by
            `graftune.adapters.mask_tuning.select` or by the trainer when it starts. None: all.
        recompute: compute W ⊙ mask again in the backward pass instead of keeping it.
        target_modules: names or a regular expression of the modules to adapt, or "all-linear".
        target_parameters: names of parameters to adapt by themselves, for example
            `attn.in_proj_weight`.
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt; with a list of target modules.
        layers_pattern: name of the list of layers that the indices refer to.
        init_weights: True starts with nothing masked; False with a random mask, for tests.
        modules_to_save: modules to train in full and to save with the adapter.

    Raises:
        TypeError: `target_parameters` is a string.
        ValueError: a field is out of range or two fields contradict each other.

    Example:
        >>> MaskTuningConfig(target_modules=["fc1"], fraction=0.05).threshold
        0.005
    """

    about: ClassVar[str] = (
        "Mask tuning trains no new weights: it learns which of the pretrained ones to switch off, "
        "as a binary mask ([Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained "
        "Vision-Language Models](https://arxiv.org/abs/2307.15049))."
    )

    targets: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "What to mask: 'attention', 'attention+mlp', 'all', or names of modules; "
            "graftune.wrap finds it in the model."
        },
    )
    init: float = field(default=0.01, metadata={"help": "First value of the scores."})
    threshold: float = field(
        default=0.005, metadata={"help": "A weight is masked unless its score is above this."}
    )
    fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of each tensor that gets scores, in (0, 1): its most important weights "
            "by accumulated gradient. None: all of them."
        },
    )
    recompute: bool = field(
        default=False,
        metadata={"help": "Compute masked weights again in the backward pass, to save memory."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts as the base model; False at a random mask, for tests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MASK_TUNING
        _check_number("init", self.init)
        _check_number("threshold", self.threshold)
        if not self.threshold < self.init:
            raise ValueError(
                f"`threshold` must be below `init`, got threshold={self.threshold!r} and "
                f"init={self.init!r}: everything would be masked at the start. The paper has "
                "init=0.01 and threshold=0.005"
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(
                f"`fraction` must be between 0 and 1, got {self.fraction!r}; None gives every "
                "weight a score"
            )


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}")

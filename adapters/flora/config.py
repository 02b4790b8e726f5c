"""The config of FLoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graftune.adapters.base.config import WeightConfig
from graftune.adapters.base.registration import add_peft_type

FLORA = add_peft_type("FLORA")


@dataclass
class FloraConfig(WeightConfig):
    """Config of FLoRA, which adds ΔW = s · G ×_0 U_0 ... ×_{N-1} U_{N-1} to weights of any rank N.

    The update is a Tucker form with a trainable core G and one trainable factor for each axis of
    the weight (FLoRA: Low-Rank Core Space for N-dimension, arXiv 2405.14739).

    Args:
        r: Tucker ranks, positive. One number stands for every axis and is cut to the axis's
            dimension (a 3×3 kernel gets at most 3); a list has one rank for each axis in the
            weight's own order: (out, in) for Linear, (out, in / groups, *kernel) for
            convolutions, (in, out / groups, *kernel) for transposed ones, (in, out) for
            transformers' Conv1D, (num, dim) for Embedding.
        scale: s, finite. The authors use 4 for ConvNeXt.
        dropout: probability, in [0, 1), of dropping an entry of the added branch's input.
        target_modules: names or a regular expression of the modules to adapt, or "all-linear".
        target_parameters: names of parameters to adapt where they are used by themselves rather
            than through a module, for example `attn.in_proj_weight`; at least two axes each.
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt; with a list of target modules.
        layers_pattern: name of the list of layers that the indices refer to.
        rank_pattern: other ranks for modules whose name matches a regular expression.
        scale_pattern: other scales for modules whose name matches a regular expression.
        init_weights: True starts at ΔW = 0; False at random, for tests.
        modules_to_save: modules to train in full and to save with the adapter.

    Raises:
        TypeError: `target_parameters` is a string.
        ValueError: a field is out of range or two fields contradict each other.

    Example:
        >>> FloraConfig(r=[16, 16, 2, 2], scale=4.0, dropout=0.01, target_modules=["conv"]).r
        [16, 16, 2, 2]
    """

    about: ClassVar[str] = (
        "FLoRA adds to each weight a low-rank update that keeps the weight's own axes: a small "
        "core with one factor for each axis, so that the kernel of a convolution is never "
        "flattened into a matrix "
        "([FLoRA: Low-Rank Core Space for N-dimension](https://arxiv.org/abs/2405.14739))."
    )

    r: int | list[int] = field(
        default=8,
        metadata={
            "help": "Tucker ranks: one number for every axis of a weight (cut to the axis's "
            "dimension), or one for each axis in the weight's own order."
        },
    )
    scale: float = field(
        default=1.0, metadata={"help": "Factor that multiplies the weight update."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of the added branch, in [0, 1)."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters to adapt by themselves, for example "
            "'attn.in_proj_weight'; each needs at least two axes."
        },
    )
    rank_pattern: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Other ranks for some modules: names or regular expressions to values of r."
        },
    )
    scale_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Other scales for some modules: names or regular expressions to scales."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts as the base model; False starts at random, for tests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FLORA
        self.r = _checked_rank("r", self.r)
        self.rank_pattern = {
            pattern: _checked_rank(f"rank_pattern[{pattern!r}]", rank)
            for pattern, rank in (self.rank_pattern or {}).items()
        }
        self.scale_pattern = dict(self.scale_pattern or {})
        _check_scale("scale", self.scale)
        for pattern, scale in self.scale_pattern.items():
            _check_scale(f"scale_pattern[{pattern!r}]", scale)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout!r}")


def _checked_rank(name: str, rank: Any) -> int | list[int]:
    """Return a rank as an int or a list of ints, or raise ValueError."""
    values = rank if isinstance(rank, Sequence) and not isinstance(rank, str) else [rank]
    good = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
    if not good or not values:
        raise ValueError(
            f"`{name}` must be a positive int, or a list of them with one for each axis of the "
            f"weight, got {rank!r}"
        )
    # A list and not a tuple: that is what comes back from the saved JSON.
    return rank if isinstance(rank, int) else list(rank)


def _check_scale(name: str, scale: Any) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"`{name}` must be a finite number, got {scale!r}")

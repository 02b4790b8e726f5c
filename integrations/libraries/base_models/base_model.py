"""A base model with what belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

OBJECTIVES = ("class_names", "image_classes", "causal_lm", "denoising")


@dataclass(frozen=True)
class BaseModel:
    """A base model with what belongs to it.

    Args:
        model: the model, in evaluation mode.
        objective: the name of the objective it is loaded for; one of `OBJECTIVES`.
        tokenizer: texts to tokens; a processor where that holds the tokenizer.
        transform: pictures to pixels, as `graftune.integrations.data.pixels` takes it.
        parts: of a diffusers pipeline: "scheduler", and "vae", "text_encoder" where it has them.
        outputs: for "image_classes", the classes in the order of the model's outputs.
        new_head: name of the module that was made anew for other classes than the model's own.
    """

    model: nn.Module
    objective: str
    tokenizer: Any = None
    transform: Callable[..., Any] | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    new_head: str | None = None

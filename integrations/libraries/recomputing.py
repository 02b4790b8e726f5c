"""Activation checkpointing of frozen base models, whichever library they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from graftune.integrations.objectives.unwrap import base_of

# How open_clip and timm, and diffusers, call it.
_METHODS = ("set_grad_checkpointing", "enable_gradient_checkpointing")


def wants_checkpointing(args: Any) -> bool:
    """Say whether training arguments ask for activation checkpointing, by its new or old name."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return any(getattr(args, name, False) for name in names)


def is_reentrant(args: Any) -> bool:
    """Say whether they ask for its reentrant form."""
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    given: list[Mapping[str, Any]] = [getattr(args, name, None) or {} for name in names]
    return wants_checkpointing(args) and any(kwargs.get("use_reentrant") for kwargs in given)


@contextmanager
def checkpointing(model: nn.Module, args: Any) -> Iterator[None]:
    """Let a trainer that asks for it switch on activation checkpointing of an adapted model.

    transformers' models have it. Under a frozen base its reentrant form cuts the gradients of
    every adapter, unless the inputs of the first block have gradients: here they have. The models
    of open_clip, timm and diffusers have it under other names.

    Args:
        model: the adapted model.
        args: transformers' training arguments.

    Raises:
        ValueError: the base model has no activation checkpointing.
    """
    if not wants_checkpointing(args) or hasattr(model, "activation_checkpointing_enable"):
        if is_reentrant(args):
            base_of(model).enable_input_require_grads()
        yield
        return
    base: Any = base_of(model)
    found = next((name for name in _METHODS if hasattr(base, name)), None)
    if found is None:
        raise ValueError(
            f"{type(base).__name__} has no activation checkpointing; train without "
            "activation_checkpointing (gradient_checkpointing)"
        )
    switch: Any = model
    switch.activation_checkpointing_enable = lambda **kwargs: getattr(base, found)()
    try:
        yield
    finally:
        del switch.activation_checkpointing_enable

"""Batches in which every entry runs with an adapter of its own (`adapter_names=` in forward)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.flora.layer import FloraLayer
from graftune.adapters.flora.weight import FloraWeight

BASE = "__base__"  # PEFT's name for "no adapter"


@contextmanager
def mixed_batch(
    model: nn.Module, adapter_names: Sequence[str], num_beams: int = 1
) -> Iterator[None]:
    """Hand `adapter_names` to every layer for the duration of one forward pass or generation.

    Args:
        model: the model with adapters.
        adapter_names: one name for each entry of the batch, "__base__" for the base model.
        num_beams: beams of a beam search, which repeats each entry so many times.

    Raises:
        ValueError: the model is in training mode, an adapter does not exist, or one of them
            adapts parameters that a whole batch has to share.
    """
    check_mixed_batch(model, adapter_names)
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = model if num_beams == 1 or get_encoder is None else get_encoder()
    # The encoder of an encoder-decoder model sees each entry once, whatever the number of beams.
    in_encoder = set() if encoder is model else set(encoder.modules())
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_names, names=list(adapter_names) if module in in_encoder else repeated),
            with_kwargs=True,
        )
        for module in model.modules()
        if isinstance(module, (FloraLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise the errors that `mixed_batch` names."""
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(
            f"`adapter_names` must be a list with one name for each entry of the batch, got "
            f"{adapter_names!r}"
        )
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [(key, layer) for key, layer in model.named_modules() if isinstance(layer, FloraLayer)]
    known = {adapter for _, layer in layers for adapter in layer.scaling}
    asked = set(adapter_names) - {BASE}
    if unknown := sorted(asked - known):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}."
            f"{nearest(unknown[0], known)} There are {listing(sorted(known))}."
        )
    shared = [
        key for key, layer in layers if not _is_per_entry(layer) and asked & layer.scaling.keys()
    ]
    if shared:
        raise ValueError(
            f"`adapter_names` cannot be used with adapters on {listing(shared, 3)}: these run with "
            "W + ΔW, one weight for the whole batch. Run one batch for each adapter"
        )


def _is_per_entry(layer: FloraLayer) -> bool:
    return isinstance(layer, FloraWeight) and layer.has_branch and not layer.weight_is_read


def _pass_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}

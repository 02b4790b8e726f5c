"""Layers of several methods: the order in which they are merged, and taking them off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from graftune.adapters.stack.neighbours import acts_on_base


def merge_order(model: nn.Module) -> list[Any]:
    """Return the tuner layers of a model in the order in which to merge them.

    Masks come first: they act on the pretrained weight, wherever they stand. The others follow from
    the inside out, as the forward pass goes through them. Unmerging goes backwards.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return sorted(reversed(layers), key=lambda layer: not acts_on_base(layer))


def take_off_layers(
    model: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None
) -> None:
    """Take off all layers around modules, one by one, from the outside in.

    Layers themselves are merged before, where they are to be; `merge` says whether modules that
    were trained in full take the place of the base model's.
    """
    while found := next(_around_modules(model), None):
        parent, name, layer = found
        if isinstance(layer, AuxiliaryTrainingWrapper):
            inner = layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        elif hasattr(type(layer), "unload_and_optionally_merge_module"):
            inner = layer.unload_and_optionally_merge_module(False, False, None)
        else:
            inner = layer.base_layer
        setattr(parent, name, inner)


def _around_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            around = isinstance(child, BaseTunerLayer) and hasattr(child, "base_layer")
            if around or isinstance(child, AuxiliaryTrainingWrapper):
                yield parent, name, child

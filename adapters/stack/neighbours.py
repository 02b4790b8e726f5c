"""Layers of several methods at one module: who goes around whom, and who cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from graftune.adapters.base.hooks import HookedLayer
from graftune.adapters.base.modules import without_base_layers
from graftune.adapters.sara.layer import SaraLayer


def attaching_order(layer_classes: Sequence[type]) -> list[int]:
    """Return the order in which to attach parts, by their numbers.

    Masks go around all layers that add: they act on the pretrained weight through whatever is
    inside. What enters by hooks comes last, so that its hooks are on what all others compute.
    """

    def rank(number: int) -> tuple[bool, bool]:
        cls = layer_classes[number]
        return issubclass(cls, HookedLayer), acts_on_base(cls)

    return sorted(range(len(layer_classes)), key=rank)


def acts_on_base(layer: Any) -> bool:
    """Say whether a layer, or a class of layers, acts on the pretrained weight as masks do."""
    return getattr(layer, "acts_on_base", False)


def check_neighbours(model: nn.Module) -> None:
    """Raise ValueError where layers of two methods meet at one module and cannot.

    PEFT's LoRA of attentions deletes and writes the weights of its `nn.MultiheadAttention` in each
    forward pass. SaRA computes no gradient of the weights that it does not train, of which masks
    have theirs. What a method puts into a module's output by a hook would be taken for the module's
    own by a layer that adds to it.
    """
    for name, found in model.named_modules():
        if not isinstance(found, BaseTunerLayer):
            continue
        module: Any = found
        inside = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        others = [layer for layer in inside if not isinstance(layer, LoraLayer)]
        if others and any(isinstance(layer, MultiheadAttention) for layer in inside):
            raise ValueError(
                f"PEFT's LoRA on the torch.nn.MultiheadAttention {without_base_layers(name)!r} "
                f"cannot share it with another method (here {type(others[0]).__name__}): leave the "
                "attention out of the `target_modules` of one of them, or take FLoRA for LoRA"
            )
        if acts_on_base(module) and any(isinstance(layer, SaraLayer) for layer in inside):
            raise ValueError(
                f"masks on {without_base_layers(name)!r} would have no gradient, as SaRA trains "
                "some of its weights and passes none to the others: leave the module out of the "
                "`target_modules` of one of them"
            )
        if not acts_on_base(module) and _has_adapters_hook(module.get_base_layer()):
            raise ValueError(
                f"another method's hook is on the output of {without_base_layers(name)!r} already: "
                f"attach {type(module).__name__} before it, in one list of methods, or leave the "
                "module out of its `target_modules`"
            )


def _has_adapters_hook(module: Any) -> bool:
    hooks = (getattr(hook, "func", hook) for hook in module._forward_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), HookedLayer) for hook in hooks)

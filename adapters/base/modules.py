"""Looking at a model's base modules, whatever tuner layers stand around them."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base model's modules with their names in the bare model.

    Tuner layers are seen through; what they hold beside the base layer is left out.

    Example:
        >>> [name for name, _ in base_modules(nn.Sequential(nn.Linear(2, 2)))]
        ['0']
    """
    for name, child in model.named_children():
        if stands_beside(child):
            continue
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        yield name, base
        for inner, module in base_modules(base):
            yield f"{name}.{inner}", module


def stands_beside(module: nn.Module) -> bool:
    """Say whether a module is a tuner layer beside the base modules, around none of them."""
    return isinstance(module, BaseTunerLayer) and not hasattr(module, "base_layer")


def without_base_layers(key: str) -> str:
    """Return a name without the tuner layers on its way: the name in the bare model.

    Example:
        >>> without_base_layers("encoder.0.base_layer.weight")
        'encoder.0.weight'
    """
    return ".".join(part for part in key.split(".") if part != "base_layer")


def is_target_parameter(config: PeftConfig, name: str) -> bool:
    """Say whether `target_parameters` names a parameter, in full or by how its name ends."""
    targets = getattr(config, "target_parameters", None) or ()
    return any(name == target or name.endswith(f".{target}") for target in targets)


def without_index(key: str) -> str:
    """Return what follows the last layer number in a name: what `target_modules` usually says.

    Example:
        >>> without_index("encoder.layers.11.mlp.fc1")
        'mlp.fc1'
    """
    parts = key.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else key

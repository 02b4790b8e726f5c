"""Looking at a model's base modules, whatever tuner layers stand around them."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base model's modules with their names in the bare model.

    Tuner layers are seen through; what they hold beside the base layer is left out.

    Example:
        >>> [name for name, _ in base_modules(nn.Sequential(nn.Linear(2, 2)))]
        ['0']
    """
    wrapped: list[str] = []
    for key, module in model.named_modules():
        if any(key.startswith(f"{layer}.") for layer in wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped.append(key)
            base = module.get_base_layer()
            for inner, child in base.named_modules(prefix=key):
                if not isinstance(child, BaseTunerLayer):
                    yield inner, child
        elif key:
            yield key, module


def canonical_name(key: str) -> str:
    """Return a module's name in the bare base model.

    Example:
        >>> canonical_name("base_model.model.encoder.0.base_layer")
        'encoder.0'
    """
    parts = key.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part != "base_layer")


def without_index(key: str) -> str:
    """Return what follows the last layer number in a name: what `target_modules` usually says.

    Example:
        >>> without_index("encoder.layers.11.mlp.fc1")
        'mlp.fc1'
    """
    parts = key.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else key

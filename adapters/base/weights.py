"""What an adapter does to the base model's weights, for methods that add to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graftune.adapters.base.modules import without_base_layers


def weight_changes(model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield name and ΔW of every base weight that the active adapters of a model change.

    ΔW comes as a function that computes it with gradients, so that one dense ΔW at a time exists.
    Where several layers change one weight it is what all of them change together.

    Args:
        model: a model with adapters of graftune's or of PEFT's.

    Raises:
        TypeError: the method's change of a weight is not a sum W + ΔW, as with OFT.

    Example:
        >>> {name: float(change().norm()) for name, change in weight_changes(model)}
    """
    changes: dict[str, list[Callable[[], Tensor]]] = {}
    for key, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        name = without_base_layers(key.removeprefix("base_model.model."))
        for adapter in layer.active_adapters:
            if adapter not in layer._get_available_adapters():
                continue
            for weight, change in _changes(name, layer, adapter).items():
                changes.setdefault(f"{name}.{weight}", []).append(change)
    for name, of_weight in changes.items():
        yield name, of_weight[0] if len(of_weight) == 1 else partial(_together, of_weight)


def _together(changes: list[Callable[[], Tensor]]) -> Tensor:
    return sum((change() for change in changes[1:]), start=changes[0]())


def _changes(name: str, layer: Any, adapter: str) -> dict[str, Callable[[], Tensor]]:
    own = getattr(layer, "weight_changes", None)
    if own is not None:
        return own(adapter)
    if not _adds(layer, adapter):
        raise TypeError(
            f"the {type(layer).__module__}.{type(layer).__name__} at {name!r} does not add to the "
            "weight, so there is no ΔW; use a method that adds, such as LoRA or FLoRA, or measure "
            "the adapter's own weights"
        )
    return {"weight": partial(layer.get_delta_weight, adapter)}


def _adds(layer: BaseTunerLayer, adapter: str) -> bool:
    if isinstance(layer, LoraLayer):
        return adapter not in layer.lora_variant  # DoRA and others do otherwise
    # PEFT's own mark of a method that adds ΔW to the weight.
    return layer.supports_lora_conversion(adapter)

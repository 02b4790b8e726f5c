"""What an adapter trains of the base model's own weights, for methods that train some entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


@dataclass(frozen=True)
class SparsePart:
    """The trained entries of one tensor.

    Args:
        name: the name of `values` in the model.
        values: (n,), the entries in the tensor's row-major order.
        shape: the tensor's shape.
        dense: (n,) to a tensor of that shape, zero elsewhere.
        entries: the inverse: takes (n,) out of a tensor of that shape.
        outside: (n,) to booleans: values that the selection would not take any more.
    """

    name: str
    values: nn.Parameter
    shape: tuple[int, ...]
    dense: Callable[[Tensor], Tensor]
    entries: Callable[[Tensor], Tensor]
    outside: Callable[[Tensor], Tensor]


def sparse_parts(model: nn.Module) -> Iterator[SparsePart]:
    """Yield what the active adapters of a model train of its tensors; nothing for other methods.

    Example:
        >>> model = graftune.wrap(unet, "sara")
        >>> sum(part.values.numel() for part in sparse_parts(model))
    """
    for key, layer in model.named_modules():
        own: Any = getattr(layer, "sparse_parts", None)
        if isinstance(layer, BaseTunerLayer) and own is not None:
            for adapter in layer.active_adapters:
                yield from own(key, adapter)

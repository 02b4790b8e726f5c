"""What FLoRA can adapt: which modules and parameters, and the shapes of what is added to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftune.adapters.base.layer_types import (
    CONVOLUTIONS,
    SUPPORTED,
    TRANSPOSED,
    is_quantized_linear,
)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight, from attributes that hold when it is sharded, too.

    Raises:
        TypeError: the module is of no supported type.

    Example:
        >>> weight_shape(nn.Conv2d(8, 16, 3, groups=2))
        (16, 4, 3, 3)
    """
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    if isinstance(module, TRANSPOSED):
        return module.in_channels, module.out_channels // module.groups, *module.kernel_size
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear) or is_quantized_linear(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    names = ", ".join(f"`{cls.__module__.split('.')[0]}.{cls.__name__}`" for cls in SUPPORTED)
    raise TypeError(
        f"modules of type {type(module).__name__} are not supported. Supported are {names}, "
        "`torch.nn.MultiheadAttention`, and parameters by name through `target_parameters`"
    )


def tensor_shapes(
    shape: Sequence[int], ranks: Sequence[int], parameter: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors by their names under the layer in a checkpoint."""
    tail = "" if parameter is None else f".{parameter}"
    shapes = {f"flora_core{tail}": tuple(ranks)}
    for axis, size in enumerate(zip(shape, ranks, strict=True)):
        shapes[f"flora_factor{axis}{tail}"] = size
    return shapes


def stride_product(module: nn.Module) -> int:
    """Return the product of a convolution's strides, 1 for other layers."""
    return math.prod(getattr(module, "stride", ()) or (1,))

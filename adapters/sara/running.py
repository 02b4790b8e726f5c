"""How a module runs with some entries of its weight trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftune.adapters.base.layer_types import CONVOLUTIONS, TRANSPOSED, runs_as_defined
from graftune.adapters.sara.autograd import SparseConvolution, SparseEmbedding, SparseLinear
from graftune.adapters.sara.weight import WeightInUse

# (module, values, weight, bias, inputs...) to the module's output.
Run = Callable[..., Tensor]


def runner(module: nn.Module) -> Run | None:
    """Return what runs a module with a sparse gradient of its `weight`; None if only W′ itself can.

    The latter are modules that do more with their weight than their type says, and those whose
    weight is too small to matter, as norms.
    """
    if not runs_as_defined(module):
        return None
    if isinstance(module, (nn.Linear, Conv1D)):
        return _linear
    if isinstance(module, CONVOLUTIONS):
        return _convolution
    if isinstance(module, TRANSPOSED):
        return _transposed
    is_plain = type(module) is nn.Embedding and not module.scale_grad_by_freq
    return _embedding if is_plain and module.max_norm is None else None


def has_hooks(module: nn.Module) -> bool:
    """Say whether a module does more than its `forward` when it is called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or bool(module._backward_pre_hooks) or hasattr(module, "_hf_hook")


def _linear(
    module: Any, values: Tensor | None, weight: WeightInUse, bias: Tensor | None, x: Tensor
) -> Tensor:
    x, bias = _cast(module, x, bias)
    return SparseLinear.apply(x, values, bias, weight, isinstance(module, Conv1D))


def _convolution(
    module: Any, values: Tensor | None, weight: WeightInUse, bias: Tensor | None, x: Tensor
) -> Tensor:
    axes = len(module.kernel_size)
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * axes
    geometry = (module.stride, padding, module.dilation, False, (0,) * axes, module.groups)
    return _convolve(module, values, weight, bias, x, geometry)


def _transposed(
    module: Any,
    values: Tensor | None,
    weight: WeightInUse,
    bias: Tensor | None,
    x: Tensor,
    output_size: list[int] | None = None,
) -> Tensor:
    axes = len(module.kernel_size)
    extra = module._output_padding(
        x,
        output_size,
        list(module.stride),
        list(module.padding),
        list(module.kernel_size),
        axes,
        list(module.dilation),
    )
    geometry = (
        module.stride,
        module.padding,
        module.dilation,
        True,
        tuple(extra),
        module.groups,
    )
    return _convolve(module, values, weight, bias, x, geometry)


def _convolve(
    module: Any,
    values: Tensor | None,
    weight: WeightInUse,
    bias: Tensor | None,
    x: Tensor,
    geometry: Any,
) -> Tensor:
    x, bias = _cast(module, x, bias)
    is_batched = x.dim() == len(module.kernel_size) + 2
    x = x if is_batched else x.unsqueeze(0)
    y = SparseConvolution.apply(x, values, bias, weight, geometry)
    return y if is_batched else y.squeeze(0)


def _embedding(
    module: Any, values: Tensor | None, weight: WeightInUse, bias: Tensor | None, ids: Tensor
) -> Tensor:
    return SparseEmbedding.apply(ids, values, weight, module.weight.dtype, module.padding_idx)


def _cast(module: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cast as autocast casts the inputs of linear layers and convolutions."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
        return x, None if bias is None else bias.to(x.dtype)
    if x.dtype != module.weight.dtype:
        raise RuntimeError(
            f"{type(module).__name__} has weights of {module.weight.dtype} and got inputs of "
            f"{x.dtype}"
        )
    return x, bias

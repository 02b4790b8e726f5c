"""The types of layers whose weights can be adapted, and the shapes of their parameters."""

from __future__ import annotations

from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED = (nn.Linear, Conv1D, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding)


def parameter_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the whole shape of a parameter that DeepSpeed may have partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def projection_names(attention: nn.MultiheadAttention) -> list[str]:
    """Return the names of the input projections' parameters: one if packed, three otherwise."""
    if attention.in_proj_weight is not None:
        return ["in_proj_weight"]
    return ["q_proj_weight", "k_proj_weight", "v_proj_weight"]


def runs_as_defined(module: nn.Module) -> bool:
    """Say whether a module computes what its supported base class computes.

    Subclasses do otherwise at times: they standardise their weight or pad by a rule of their own.
    Adding the output of ΔW alone would be wrong then; such a layer is run with W + ΔW instead.
    """
    if is_quantized_linear(module):
        return True
    base = next((cls for cls in SUPPORTED if isinstance(module, cls)), None)
    if base is None:
        return False
    if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return True  # the scale is known and applied
    return all(
        getattr(type(module), name, None) is getattr(base, name, None)
        for name in ("forward", "_conv_forward", "_output_padding")
    )


def is_quantized_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer of a library that quantises its weight."""
    # torchao asks for the model's own quantiser at this point: that one is an nn.Linear anyway.
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=len)
    return (
        backend is not None and hasattr(module, "out_features") and hasattr(module, "in_features")
    )

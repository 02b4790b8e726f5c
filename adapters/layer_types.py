"""The types of layers whose weights can be adapted, and the shapes of their parameters."""

from __future__ import annotations

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def parameter_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the whole shape of a parameter that DeepSpeed may have partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def projection_names(attention: nn.MultiheadAttention) -> list[str]:
    """Return the names of the input projections' parameters: one if packed, three otherwise."""
    if attention.in_proj_weight is not None:
        return ["in_proj_weight"]
    return ["q_proj_weight", "k_proj_weight", "v_proj_weight"]

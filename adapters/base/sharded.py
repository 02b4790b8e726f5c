"""Tensors that are spread over processes (torch's DTensor, as FSDP makes them)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def check_trained_weights(model: nn.Module, purpose: str) -> None:
    """Raise ValueError where the trained weights are empty in this process.

    Args:
        model: the adapted model.
        purpose: what they are for, as in "L2ToStart measures weights".
    """
    if any(p.requires_grad and not p.numel() for p in model.parameters()):
        raise ValueError(
            f"{purpose}, and those of this process are empty (DeepSpeed ZeRO-3 or FSDP 1); train "
            "with DDP, FSDP 2 or ZeRO-2"
        )


def is_sharded(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is, or gathered from all processes: all of them have to call this."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def spread_like(tensor: torch.Tensor, other: Any) -> torch.Tensor:
    """Return a tensor with the device, the dtype and the spread of another one."""
    if is_sharded(tensor) and is_sharded(other):
        return tensor
    moved = whole(tensor).to(other.device, other.dtype)
    if not is_sharded(other):
        return moved
    # Only where it is needed: importing it takes longer than all of graftune's adapters.
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(moved, other.device_mesh, other.placements)


def keep_spread(parameter: Any) -> None:
    """Let gradients of a sharded parameter be spread as it is, whatever they are computed from.

    FSDP adds its own to what is there; one that is whole, or a summand in each process, as those of
    terms of the weights alone come out, would not fit or be wrong.
    """
    if not is_sharded(parameter):
        return
    parameter.register_hook(
        lambda gradient: gradient.redistribute(parameter.device_mesh, parameter.placements)
    )

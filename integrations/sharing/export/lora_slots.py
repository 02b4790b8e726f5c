"""Which layer of PEFT's LoRA stands for a changed base tensor, and which have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftune.adapters.base.layer_types import CONVOLUTIONS, runs_as_defined
from graftune.integrations.sharing.export.changes import Change


class NoSlotError(ValueError):
    """PEFT's LoRA has no layer for a base tensor; the message says why."""


@dataclass(frozen=True)
class Slot:
    """The layer of PEFT's LoRA that changes one base tensor.

    Args:
        kind: "linear", "embedding", "conv", "attention" (an `nn.MultiheadAttention` as a whole) or
            "parameter" (LoRA's `target_parameters`).
        module: the name of the module that LoRA is put on.
        is_in_out: the base tensor is stored as (in, out), so that it changes by (BA)ᵀ.
        groups: of a convolution.
        stacked: the tensor is a stack of matrices, each with a LoRA of its own.
    """

    kind: Literal["linear", "embedding", "conv", "attention", "parameter"]
    module: str
    is_in_out: bool = False
    groups: int = 1
    stacked: bool = False


def find_slot(change: Change, modules: Mapping[str, nn.Module]) -> Slot:
    """Return the slot of a changed tensor.

    Args:
        change: the tensor.
        modules: the base model's modules by name.

    Raises:
        NoSlotError: there is none.
    """
    names = change.module.split(".")
    above = [modules[".".join(names[:i])] for i in range(len(names))]
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in above):
        raise NoSlotError(
            "PyTorch's fused inference of nn.TransformerEncoderLayer reads the weights past PEFT's "
            "LoRA layers"
        )
    if above and isinstance(above[-1], nn.MultiheadAttention):
        return _in_attention(change, ".".join(names[:-1]), above[-1])
    if isinstance(change.owner, nn.MultiheadAttention):
        return _in_attention(change, change.module, change.owner)
    if change.parameter == "weight":
        slot = _around_module(change)
        if slot is not None:
            return slot
    return _of_parameter(change)


def _in_attention(change: Change, module: str, attention: nn.MultiheadAttention) -> Slot:
    if attention.in_proj_weight is None:
        raise NoSlotError(
            "PEFT's LoRA of an nn.MultiheadAttention needs queries, keys and values of one width"
        )
    if change.parameter not in ("in_proj_weight", "weight"):
        raise NoSlotError("PEFT's LoRA of an nn.MultiheadAttention leaves its other tensors alone")
    if change.parameter == "weight" and adds_output_projection_twice():
        raise NoSlotError(
            f"PEFT {peft.__version__} adds the LoRA of an nn.MultiheadAttention's output "
            "projection twice"
        )
    return Slot("attention", module)


@cache
def adds_output_projection_twice() -> bool:
    """Say whether the installed PEFT changes an attention's output projection by 2 B A.

    PEFT 0.21 does. No file can be right for it and for a version that does not.
    """
    with torch.random.fork_rng():
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(1, 1)})
        config = peft.LoraConfig(r=1, target_modules=["attention"], init_lora_weights=False)
        model: Any = peft.get_peft_model(base, config)
    layer = model.base_model.model.attention
    once = layer.out_proj.weight + layer.base_layer.out_proj.get_delta_weight("default")
    layer.merge()
    return not torch.allclose(layer.out_proj.weight, once)


def _around_module(change: Change) -> Slot | None:
    owner = change.owner
    if isinstance(owner, nn.modules.conv._ConvNd):
        return _around_convolution(change, owner)
    if not isinstance(owner, nn.Linear | Conv1D | nn.Embedding) and not runs_as_defined(owner):
        return None
    if not runs_as_defined(owner):
        raise NoSlotError(
            f"{type(owner).__name__} computes in a way of its own, which PEFT's LoRA does not know"
        )
    if isinstance(owner, nn.Embedding):
        return Slot("embedding", change.module, is_in_out=True)
    return Slot("linear", change.module, is_in_out=isinstance(owner, Conv1D))


def _around_convolution(change: Change, owner: nn.modules.conv._ConvNd) -> Slot:
    if not isinstance(owner, CONVOLUTIONS):
        raise NoSlotError("PEFT's LoRA has no layer for transposed convolutions")
    if not runs_as_defined(owner):
        raise NoSlotError(
            f"{type(owner).__name__} computes in a way of its own, which PEFT's LoRA does not know"
        )
    if owner.padding_mode != "zeros":
        raise NoSlotError("PEFT's LoRA of a convolution pads with zeros only")
    if any(step != 1 for step in owner.dilation):
        raise NoSlotError("PEFT's LoRA of a convolution knows no dilation")
    return Slot("conv", change.module, groups=owner.groups)


def _of_parameter(change: Change) -> Slot:
    axes = change.base.dim()
    if axes not in (2, 3):
        raise NoSlotError(f"PEFT's LoRA has no form for a tensor of {axes} axes by itself")
    if not change.module:
        raise NoSlotError("PEFT's LoRA cannot adapt parameters of the model itself")
    # LoRA takes a stack as (number, out, in), unless its module says that it is transposed.
    is_in_out = axes == 3 and bool(getattr(change.owner, "is_transposed", False))
    return Slot("parameter", change.module, is_in_out, stacked=axes == 3)

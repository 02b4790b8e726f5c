"""The forms of one adapted layer that the FLoRA benchmark compares, at equal sizes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune import FloraConfig

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Form:
    """One way to adapt a layer: what to call, and what is trained."""

    run: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...] = ()

    @property
    def count(self) -> int:
        """Return the number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters)


class DenseTucker(nn.Module):
    """A frozen layer plus a second full operation with the dense ΔW, as FLoRA was released.

    ΔW is multiplied out from the core and the factors in every forward, smallest axes first.
    """

    def __init__(self, base: Layer, core: Tensor, factors: Sequence[Tensor], scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.core = nn.Parameter(core.detach().clone())
        self.factors = nn.ParameterList(factor.detach().clone() for factor in factors)

    def delta(self) -> Tensor:
        """Return ΔW in the shape of the layer's weight."""
        weight = self.core
        for axis in reversed(range(len(self.factors))):
            weight = torch.tensordot(weight, self.factors[axis], dims=([axis], [1]))
            weight = weight.movedim(-1, axis)
        return weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return self.base(x) + F.linear(x, self.delta())
        base = self.base
        return base(x) + F.conv2d(
            x, self.delta(), None, base.stride, base.padding, base.dilation, base.groups
        )


def adapt(base: Layer, config: peft.PeftConfig) -> tuple[peft.PeftModel, nn.Module]:
    """Return a PEFT model that holds a copy of one layer, and the adapted layer in it.

    The adapter is at random, as after some steps: ΔW is not zero.
    """
    model = peft.get_peft_model(nn.ModuleDict({"layer": copy.deepcopy(base)}), config)
    with torch.no_grad():
        for parameter in _trainable(model):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model, model.base_model.model["layer"]


def flora_config(ranks: Sequence[int]) -> FloraConfig:
    """Return the config of the FLoRA layers; a scale other than 1 costs what it costs users."""
    return FloraConfig(r=list(ranks), scale=4.0, target_modules=["layer"])


def frozen(base: Layer) -> Form:
    """Return the frozen layer itself: what no adapter can be faster than."""
    return Form(copy.deepcopy(base).requires_grad_(False))


def flora_and_dense(base: Layer, ranks: Sequence[int]) -> tuple[Form, Form]:
    """Return FLoRA's layer and the dense form with the same numbers in it."""
    config = flora_config(ranks)
    model, layer = adapt(base, config)
    tensors = {name: tensor for name, tensor in layer.named_parameters() if "flora_" in name}
    core = next(tensor for name, tensor in tensors.items() if "flora_core" in name)
    factors = [
        next(tensor for name, tensor in tensors.items() if f"flora_factor{axis}" in name)
        for axis in range(core.dim())
    ]
    dense = DenseTucker(copy.deepcopy(base).requires_grad_(False), core, factors, config.scale)
    return Form(layer, _trainable(model)), Form(dense, _trainable(dense))


def lora(base: Layer, count: int) -> Form:
    """Return PEFT's LoRA, of the rank that trains the closest to `count` numbers."""
    rank = closest_rank(lambda r: lora_count(base, r), count)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
    model, layer = adapt(base, config)
    return Form(layer, _trainable(model))


def locon(base: Layer, count: int, bypass: bool) -> Form:
    """Return LyCORIS's LoCon, in Tucker form for a kernel, closest to `count` trained numbers.

    Args:
        base: the layer.
        count: how many numbers to train.
        bypass: True applies its factors one after the other; False, LyCORIS's default,
            multiplies ΔW out in every forward.
    """
    # LyCORIS prints what optional backends it misses.
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    from lycoris.modules.locon import LoConModule

    base = copy.deepcopy(base).requires_grad_(False)
    rank = closest_rank(lambda r: locon_count(base, r), count)
    module = LoConModule(
        "layer", base, lora_dim=rank, alpha=2 * rank, use_tucker=True, bypass_mode=bypass
    ).to(base.weight.device)
    with torch.no_grad():
        for parameter in _trainable(module):
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return Form(module, _trainable(module))


def merged(base: Layer, ranks: Sequence[int]) -> tuple[Form, Form]:
    """Return a FLoRA layer merged in place, and one merged and unloaded."""
    in_place, layer = adapt(base, flora_config(ranks))
    in_place.merge_adapter()
    model, _ = adapt(base, flora_config(ranks))
    return Form(layer), Form(model.merge_and_unload()["layer"])


def lora_count(base: Layer, rank: int) -> int:
    """Return how many numbers LoRA of a rank trains on a layer."""
    out, *rest = base.weight.shape
    return rank * (out + math.prod(rest))


def locon_count(base: Layer, rank: int) -> int:
    """Return how many numbers Tucker LoCon of a rank trains on a layer."""
    out, in_, *kernel = base.weight.shape
    core = rank * rank * math.prod(kernel) if math.prod(kernel) > 1 else 0
    return rank * (out + in_) + core


def closest_rank(count_of: Callable[[int], int], count: int) -> int:
    """Return the rank whose count is closest to the wanted one; counts grow with the rank.

    Example:
        >>> closest_rank(lambda rank: 100 * rank, 340)
        3
    """
    rank = 1
    while count_of(rank + 1) <= count:
        rank += 1
    return min((rank, rank + 1), key=lambda candidate: abs(count_of(candidate) - count))


def _trainable(module: nn.Module) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for parameter in module.parameters() if parameter.requires_grad)

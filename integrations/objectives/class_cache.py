"""When the text features of classes may be kept: the state of the model that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from graftune.adapters.base.feature_cache import places, precision


@torch.no_grad()
def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return what tells whether a model computes the same as before.

    Where every parameter is and how often it was changed in place, in which precision the model
    runs, which adapters are active, off or merged, and, since changes through `.data` are not
    counted, sums over the adapter's numbers.
    """
    parameters = list(model.parameters())
    layers = [
        m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    switches = tuple(
        (m._disable_adapters, tuple(m.active_adapters), tuple(getattr(m, "merged_adapters", ())))
        for m in layers
    )
    of_adapters = {id(p) for layer in layers for p in _adapter_parameters(layer)}
    changing = [p for p in parameters if p.requires_grad or id(p) in of_adapters]
    return places(parameters), precision(model), switches, _sums(changing)


def _adapter_parameters(layer: Any) -> Iterator[nn.Parameter]:
    for name in layer.adapter_layer_names:
        held = getattr(layer, name, None)
        if isinstance(held, nn.Module):
            yield from held.parameters()


def _sums(parameters: list[nn.Parameter]) -> tuple[float, ...]:
    """The sums of all numbers and of their squares, in one transfer from the device."""
    numbers = [p.double() for p in parameters if not p.is_meta]
    sums = [torch.stack([number.sum(), number.square().sum()]) for number in numbers]
    return tuple(torch.stack(sums).flatten().tolist()) if sums else ()


def is_whole(model: nn.Module) -> bool:
    """Say whether a model's parts can be called by themselves, without its outermost wrapper."""
    return not any(
        hasattr(p, "placements") or hasattr(p, "ds_id") for p in model.parameters()
    ) and (not any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()))

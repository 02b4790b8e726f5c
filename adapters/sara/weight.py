"""The weight of a layer, as one call of it runs: with an adapter's values at their places."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .places import Block, Places

WHOLE: tuple[None] = (None,)
# Marks of parameters whose memory FSDP and DeepSpeed fill and empty around each call.
_REPLACED = ("_fsdp_flattened", "ds_id")


class Holder(Protocol):
    """What has a weight that holds the base model's own values, or an adapter's."""

    def hold(self, adapter: str | None, values: Tensor | None) -> None:
        """Write an adapter's values into the weight, or put the base model's own back (None)."""
        ...

    def holds(self, adapter: str | None, values: Tensor | None) -> bool:
        """Say whether the weight is as `hold` with the same values has left it."""
        ...


class WeightInUse(Protocol):
    """W′ of one call of a layer.

    Attributes:
        weight: W, whatever it holds.
        places: of the trained entries; None where there are none.
        parts: what it can be had of: blocks of rows, or None for all rows at once.
    """

    weight: Tensor
    places: Places | None
    parts: tuple[Block | None, ...]

    def rows(self, values: Tensor | None, part: Block | None, dtype: torch.dtype) -> Tensor:
        """Return a part of W′ in a dtype, to be read before the thread asks for another."""
        ...

    def differentiable(self) -> WeightInUse:
        """Return the same W′ such that its rows are functions of the values to autograd."""
        ...


class WrittenWeight:
    """W′ in the memory of W: it costs what W costs.

    The values are written at the first use, in the forward pass, whatever W holds: optimizers may
    have changed them without a trace, by `values.data`. The backward pass writes them again only
    where W holds others by then.
    """

    parts: tuple[Block | None, ...] = WHOLE

    def __init__(
        self, holder: Holder, weight: Tensor, adapter: str | None, places: Places | None
    ) -> None:
        self.holder, self.weight, self.adapter, self.places = holder, weight, adapter, places
        self._is_first = True

    def rows(self, values: Tensor | None, part: Block | None, dtype: torch.dtype) -> Tensor:
        """Return all of W, which holds the values."""
        if self._is_first or not self.holder.holds(self.adapter, values):
            self.holder.hold(self.adapter, values)
        self._is_first = False
        return self.weight.to(dtype)

    def differentiable(self) -> CopiedWeight:
        """Return W′ as a copy."""
        self.holder.hold(None, None)
        return CopiedWeight(self.weight, self.places)


class CopiedWeight:
    """W′ in a copy, of a block of rows at a time: W itself is not written to."""

    def __init__(self, weight: Tensor, places: Places | None) -> None:
        self.weight, self.places = weight, places
        self.parts: tuple[Block | None, ...] = WHOLE if places is None else places.blocks

    def rows(self, values: Tensor | None, part: Block | None, dtype: torch.dtype) -> Tensor:
        """Return a copy of some rows of W with the values in them."""
        if values is None or self.places is None:
            return self.weight.to(dtype)
        return self.places.put(self.weight, values, dtype, part, for_now=True)

    def differentiable(self) -> CopiedWeight:
        """Return this one, as gradients flow through its copies."""
        return self


def is_own(module: nn.Module) -> bool:
    """Say whether a module's `weight` may be written to: only this one reads and replaces it.

    Args:
        module: the module, which has one.
    """
    if torch.compiler.is_compiling():  # a graph shall have no side effects
        return False
    weight: Any = module._parameters.get("weight")
    return (
        type(weight) is nn.Parameter  # no DTensor, nor what FSDP or `functional_call` lay there
        and weight is module.weight
        and not any(hasattr(weight, name) for name in _REPLACED)
        and weight.is_contiguous()
        and not weight.is_inference()
        and not (weight.is_cpu and weight.is_shared())
    )


def state_of(adapter: str | None, values: Tensor | None, weight: Tensor) -> tuple[Any, ...]:
    """Return what changes when the values do, or are others, or when the weight is written to."""
    tensors = (tensor for tensor in (values, weight) if tensor is not None)
    return adapter, *((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)

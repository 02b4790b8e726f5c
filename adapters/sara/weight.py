"""The weight of a layer, as one call of it runs: with an adapter's values at their places."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftune.adapters.sara.places import Block, Places

WHOLE: tuple[None] = (None,)
# Marks of parameters whose memory FSDP and DeepSpeed fill and empty around each call.
_REPLACED = ("_fsdp_flattened", "ds_id")
# One lock for all weights: one of its own could not be copied or pickled.
writing = threading.RLock()


class OwnWeight:
    """A layer's weight, which holds an adapter's values at times, and the base model's own beside.

    Args:
        weight: the parameter; None where the layer has none by that name.
    """

    def __init__(self, weight: nn.Parameter | None) -> None:
        self.weight: Any = weight
        self.adapter: str | None = None  # whose values it holds
        self._places: Places | None = None
        self._own: dict[str, Tensor] = {}  # by adapter; whatever W holds later on, these are right
        self._written: tuple[Any, ...] = ()  # by whom, and where and in which version W was then

    def write(self, adapter: str, places: Places, values: Tensor) -> Any:
        """Write an adapter's values into the weight.

        Returns:
            What tells these values from others: see `is_as`.
        """
        # What is kept in inference mode would be of no use to autograd.
        with writing, torch.inference_mode(False), torch.no_grad():
            if self.adapter not in (None, adapter):
                self.put_back()
            weight = self.weight.detach()
            if adapter not in self._own:
                self._own[adapter] = places.take(weight)
            places.write(weight, values)
            self.adapter, self._places = adapter, places
            is_lasting = isinstance(values, nn.Parameter)  # others leave their address to the next
            return self._mark((id(values), values._version) if is_lasting else object())

    def put_back(self) -> Any:
        """Put the base model's own values back, bit for bit.

        Returns:
            What tells them from others: see `is_as`.
        """
        with writing, torch.inference_mode(False), torch.no_grad():
            if self.adapter is not None:
                assert self._places is not None
                self._places.write(self.weight.detach(), self.own(self.adapter))
                self.adapter = self._places = None
            return self._mark(object())

    def forget(self) -> None:
        """Put the base model's own values back, and let others take their place from now on."""
        if self.adapter is not None:
            self.put_back()
        self._own, self._written = {}, ()

    def own(self, adapter: str) -> Tensor:
        """Return the base model's own values where it holds, or has held, an adapter's, (n,)."""
        return self._own[adapter].to(self.weight.device)

    def originals(self) -> list[Tensor]:
        """Return the original values that are kept, of all adapters."""
        return list(self._own.values())

    def base(self) -> Tensor:
        """Return the weight as the base model has it; a copy if it holds an adapter's values."""
        weight: Tensor = self.weight.detach()
        if self.adapter is None:
            return weight
        assert self._places is not None
        return self._places.put(weight, self.own(self.adapter), weight.dtype)

    def is_as(self, mark: Any) -> bool:
        """Say whether the weight is as it was when `write` or `put_back` returned the mark."""
        return self._written == (mark, *self._state())

    def _mark(self, mark: Any) -> Any:
        self._written = (mark, *self._state())
        return mark

    def _state(self) -> tuple[int, int | None]:
        weight = self.weight
        return weight.data_ptr(), None if weight.is_inference() else weight._version


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
    have changed them without a trace, by `values.data`. The backward pass writes nothing, as the
    adapter may be off or gone by then: where W has changed, it takes a copy.

    Args:
        own: the layer's weight.
        adapter: whose values; None for the base model's own.
        places: of the values.
        base: returns the weight as the base model has it, whatever W holds.
    """

    parts: tuple[Block | None, ...] = WHOLE

    def __init__(
        self,
        own: OwnWeight,
        adapter: str | None,
        places: Places | None,
        base: Callable[[], Tensor],
    ) -> None:
        self.own, self.adapter, self.places, self.base = own, adapter, places, base
        self.weight: Tensor = own.weight
        self._mark: Any = None

    def rows(self, values: Tensor | None, part: Block | None, dtype: torch.dtype) -> Tensor:
        """Return all of W′."""
        if self._mark is None:
            if self.adapter is None or self.places is None or values is None:
                self._mark = self.own.put_back()
            else:
                self._mark = self.own.write(self.adapter, self.places, values)
        if self.own.is_as(self._mark):
            return self.weight.to(dtype)
        return CopiedWeight(self.base(), self.places).rows(values, None, dtype)

    def differentiable(self) -> CopiedWeight:
        """Return W′ as a copy, in which nothing of W itself is left for autograd to keep."""
        return CopiedWeight(self.base().clone(), self.places)


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


def is_own(module: Any, own: OwnWeight) -> bool:
    """Say whether a module's `weight` may be written to: nobody else reads or replaces it.

    Args:
        module: the module.
        own: the weight that it has had from the start, which FSDP and `functional_call` replace.
    """
    if torch.compiler.is_compiling():  # a graph shall have no side effects
        return False
    weight: Any = module._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight is own.weight
        and weight is module.weight
        and not any(hasattr(weight, name) for name in _REPLACED)
        and weight.is_contiguous()
        and not weight.is_inference()
        and not (weight.is_cpu and weight.is_shared())
    )

"""Text features of classes that are computed once, as long as nothing they come from changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class FeatureCache:
    """Keeps one tensor by the state of the model that it was computed from.

    Example:
        >>> cache = FeatureCache()
        >>> features = cache.get(model, state_of(model), lambda: encode(model))
    """

    def __init__(self) -> None:
        self._model: Any = lambda: None
        self._state: Any = None
        self._features: torch.Tensor | None = None

    def get(
        self, model: nn.Module, state: Any, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return what was kept for this model in this state, or compute it and keep it."""
        if self._features is None or self._model() is not model or self._state != state:
            self._features, self._state = compute(), state
            self._model = weakref.ref(model)
        return self._features

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        return FeatureCache()

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[()]]:
        return FeatureCache, ()


@torch.no_grad()
def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return what tells whether a model computes the same as before.

    Where every parameter is and how often it was changed in place, which adapters are active, off
    or merged, and, since changes through `.data` are not counted, sums over the adapter's numbers.
    """
    parameters = list(model.parameters())
    places = tuple((p.data_ptr(), p._version) for p in parameters)
    adapters = tuple(
        (layer._disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters))
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    )
    trained = [p.double() for p in parameters if p.requires_grad and not p.is_meta]
    sums = [torch.stack([p.sum(), p.square().sum()]) for p in trained]
    return places, adapters, tuple(torch.stack(sums).flatten().tolist()) if sums else ()


def is_whole(model: nn.Module) -> bool:
    """Say whether a model's parts can be called by themselves, without its outermost wrapper."""
    return not any(
        hasattr(p, "placements") or hasattr(p, "ds_id") for p in model.parameters()
    ) and (not any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()))

"""Features that are computed once, as long as nothing that they come from changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class FeatureCache:
    """Keeps one tensor by the state of the model that it was computed from.

    Example:
        >>> cache = FeatureCache()
        >>> features = cache.get(model, frozen_state(model), lambda: encode(model))
    """

    def __init__(self) -> None:
        self._model: Any = lambda: None
        self._state: Any = None
        self._features: Tensor | None = None

    def get(self, model: nn.Module, state: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return what was kept for this model in this state, or compute it and keep it."""
        if self._features is None or self._model() is not model or self._state != state:
            self._features, self._state = compute(), state
            self._model = weakref.ref(model)
        return self._features

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        return FeatureCache()

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[()]]:
        return FeatureCache, ()


def frozen_state(model: nn.Module) -> tuple[Any, ...]:
    """Return what tells whether a model with its adapter off computes the same as before.

    Where the weights are that are not trained, how often they were changed in place, and in which
    precision the model runs.
    """
    untrained = [p for p in model.parameters() if not p.requires_grad]
    return places(untrained), precision(model)


def places(parameters: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Return where tensors are in memory, and how often each was changed in place."""
    return tuple(
        # PyTorch does not count the changes of tensors made under `torch.inference_mode`.
        (p.data_ptr(), -1 if p.is_inference() else p._version)
        for p in parameters
    )


def precision(model: nn.Module) -> torch.dtype | None:
    """Return the type that autocast computes a model in; None without it."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

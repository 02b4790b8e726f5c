"""What the frozen model says of images, before the adapted model sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from graftune.adapters.base.frozen import frozen_base


class Asker(Protocol):
    """A layer that is told the queries of the images that are about to come."""

    def current(self) -> str | None:
        """Return the adapter to use; None where there is none."""

    def answer(self, queries: Tensor) -> None:
        """Get ready for images with these queries, (B, W)."""


class Query:
    """Runs the frozen model on what enters a tower, and tells layers the features of the images.

    The frozen model is the tower with its adapter off, without gradients: one further forward pass.

    Args:
        tower: the vision transformer.
        source: the module in it whose output is features, (B, W), or tokens, (B, L, W).
        pool: of tokens the first, or the mean.
    """

    def __init__(self, tower: nn.Module, source: nn.Module, pool: Literal["first", "mean"]) -> None:
        self._tower, self._source, self._pool = tower, source, pool
        self._layers: list[Asker] = []
        self._handle: Any = None

    def hook(self, entry: nn.Module) -> None:
        """Listen at the module that images enter by."""
        self._handle = entry.register_forward_pre_hook(self._before_entry, with_kwargs=True)

    def unhook(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def add(self, layer: Asker) -> None:
        """Tell one more layer."""
        self._layers.append(layer)

    # The pass has contexts and temporary hooks that compiled graphs do not hold.
    @torch.compiler.disable
    def _before_entry(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        asking = [layer for layer in self._layers if layer.current() is not None]
        if not asking:
            return  # switched off, or this is the frozen model's pass
        queries = self._ask(args, kwargs)
        for layer in asking:
            layer.answer(queries)

    def _ask(self, args: Any, kwargs: Any) -> Tensor:
        outputs: list[Tensor] = []
        tap = self._source.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            with frozen_base(self._tower):
                self._tower(*args, **kwargs)
        finally:
            tap.remove()
        return self._pooled(outputs)

    def _pooled(self, outputs: list[Tensor]) -> Tensor:
        (output,) = outputs
        if output.ndim == 2:
            return output
        return output[:, 0] if self._pool == "first" else output.mean(1)


class Passing:
    """A tensor of the pass that is going on, which no copy of a model needs."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Passing:
        return Passing()

    def __reduce__(self) -> tuple[type[Passing], tuple[()]]:
        return Passing, ()


def find_query(layers: Iterable[nn.Module]) -> Query | None:
    """Return the query that a model's layers share, if it has one."""
    return next((m.__dict__["query"] for m in layers if "query" in m.__dict__), None)

"""What FLoRA's layers share: bookkeeping of adapters, scales and merging."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from graftune.adapters.base.parameter_layer import ParameterLayer
from graftune.adapters.flora.config import FloraConfig
from graftune.adapters.flora.functional import concatenate, tucker_weight


class FloraLayer(ParameterLayer):
    """Base of the layers that carry FLoRA adapters.

    The tensors of an adapter are `flora_core[adapter]` and `flora_factor<n>[adapter]`, one factor
    for each axis of the weight.
    """

    method = "flora"
    flora_core: Any  # by adapter; a tensor, or tensors by parameter
    flora_dropout: nn.ModuleDict

    other_param_names: tuple[str, ...] = ("r", "scale", "scaling", "uses_chain", "flora_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name)
        self.adapter_layer_names = ()
        self.r: dict[str, Any] = {}
        self.uses_chain: dict[str, bool] = {}
        self.flora_dropout = nn.ModuleDict()
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)

    # Adapters.

    def _enter_adapter(self, adapter_name: str, config: FloraConfig, scale: float) -> None:
        """Note what an adapter needs beside its tensors."""
        self.scale[adapter_name] = scale
        self.scaling[adapter_name] = scale
        if adapter_name in self.flora_dropout:
            del self.flora_dropout[adapter_name]
        if config.dropout > 0:
            self.flora_dropout[adapter_name] = nn.Dropout(config.dropout)

    def _make_room(self, axes: int) -> None:
        """Make sure that there is a core and a factor for each of so many axes."""
        names = ("flora_core", *(f"flora_factor{axis}" for axis in range(axes)))
        for name in names:
            if name not in self.adapter_layer_names:
                setattr(self, name, self._container())
                self.adapter_layer_names += (name,)

    @staticmethod
    def _container() -> nn.Module:
        return nn.ParameterDict()

    # What an adapter does to a base tensor.

    @abstractmethod
    def tensors(self, adapter: str, name: str) -> tuple[Tensor, list[Tensor]] | None:
        """Return core and factors for one base tensor; None where the adapter has none."""

    def _delta(self, adapter: str, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return ΔW of one base tensor, computed in `dtype` or the adapter's own."""
        tensors = self.tensors(adapter, name) if adapter in self.scaling else None
        return None if tensors is None else dense_delta(*tensors, self.scaling[adapter], dtype)

    @torch.no_grad()
    def weighted_sum(
        self, adapters: Sequence[str], weights: Sequence[float], name: str
    ) -> tuple[Tensor, list[Tensor]]:
        """Return core and factors of Σ_i w_i ΔW_i for one base tensor, at scale 1."""
        parts, factors = [], []
        for adapter, weight in zip(adapters, weights, strict=True):
            tensors = self.tensors(adapter, name) if adapter in self.scaling else None
            if tensors is not None:
                parts.append(tensors)
                factors.append(weight * self.scaling[adapter])
        return concatenate(parts, factors)

    @torch.no_grad()
    def load_tensors(
        self, adapter: str, name: str, values: tuple[Tensor, Sequence[Tensor]]
    ) -> None:
        """Overwrite an adapter's core and factors for one base tensor."""
        tensors = self.tensors(adapter, name)
        if tensors is None:
            raise ValueError(f"the adapter {adapter!r} does not change {name!r}")
        core, factors = tensors
        for own, value in zip((core, *factors), (values[0], *values[1]), strict=True):
            own.copy_(value)

    def effective(self, name: str, adapters: Sequence[str]) -> Tensor:
        """Return W + Σ ΔW of the adapters that change a base tensor."""
        return self._sum(name, self.original(name), adapters)

    def _sum(self, name: str, weight: Tensor, adapters: Sequence[str]) -> Tensor:
        """Return W + Σ ΔW, added up in float32 or better and rounded once to the dtype of W."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(dtype)
        for adapter in adapters:
            delta = self._delta(adapter, name, dtype)
            if delta is not None:
                total = total + delta
        return total.to(weight.dtype)

    # Merging into quantised layers.

    def original(self, name: str) -> Tensor:
        """Return a base tensor as it is without any adapter, in floating point."""
        if self.quantization_backend is None or name in self._originals:
            return super().original(name)
        return self.get_base_weight()

    def _write(self, name: str, value: Tensor) -> None:
        if self.quantization_backend is not None:
            self.set_base_weight(value)
        else:
            super()._write(name, value)

    def check_mergeable(self, adapter_names: Iterable[str]) -> None:
        """Raise ValueError if the base layer is quantised in a way that cannot be merged into."""
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ValueError(
                f"adapters cannot be merged into {self.quantization_backend.backend_name} layers: "
                "load the base model without quantisation to merge"
            )


def dense_delta(
    core: Tensor, factors: Sequence[Tensor], scale: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ΔW computed in `dtype`, or in the core's own dtype.

    Half precision on a CPU is computed in float32 and rounded at the end: its own matrix products
    are slow or missing there.
    """
    if dtype is None and core.device.type == "cpu" and core.element_size() < 4:
        return dense_delta(core, factors, scale, torch.float32).to(core.dtype)
    if dtype is not None:
        core, factors = core.to(dtype), [factor.to(dtype) for factor in factors]
    return tucker_weight(core, factors, scale)

"""What FLoRA's layers share: bookkeeping of adapters, scales and merging."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from graftune.adapters.base.scaling import ScaledLayer
from graftune.adapters.flora.config import FloraConfig
from graftune.adapters.flora.functional import concatenate, tucker_weight


class FloraLayer(nn.Module, ScaledLayer):
    """Base of the layers that carry FLoRA adapters.

    The tensors of an adapter are `flora_core[adapter]` and `flora_factor<n>[adapter]`, one factor
    for each axis of the weight.
    """

    base_layer: Any  # a module of whatever type is adapted
    flora_core: Any  # by adapter; a tensor, or tensors by parameter
    flora_dropout: nn.ModuleDict

    other_param_names: tuple[str, ...] = ("r", "scale", "scaling", "uses_chain", "flora_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = ()
        self.r: dict[str, Any] = {}
        self.scale, self.scaling = {}, {}
        self.uses_chain: dict[str, bool] = {}
        self.flora_dropout = nn.ModuleDict()
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self._backups: dict[str, Tensor] = {}
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.training = base_layer.training

    def get_base_layer(self) -> Any:
        """Return the base module, without any tuner layers around it."""
        return super().get_base_layer()

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

    # Merging.

    @abstractmethod
    def adapted_names(self, adapter_names: Iterable[str]) -> list[str]:
        """Return the names of the base tensors that any of the adapters changes."""

    @abstractmethod
    def tensors(self, adapter: str, name: str) -> tuple[Tensor, list[Tensor]] | None:
        """Return core and factors for one base tensor; None where the adapter has none."""

    def _delta(self, adapter: str, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return ΔW of one base tensor, computed in `dtype` or the adapter's own."""
        tensors = self.tensors(adapter, name) if adapter in self.scaling else None
        return None if tensors is None else dense_delta(*tensors, self.scaling[adapter], dtype)

    def weight_changes(self, adapter: str) -> dict[str, Callable[[], Tensor | None]]:
        """Return by base tensor what computes ΔW of an adapter with gradients."""
        return {name: partial(self._delta, adapter, name) for name in self.adapted_names([adapter])}

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

    def _read(self, name: str) -> Tensor:
        """Return a base tensor as it is now, in floating point."""
        if self.quantization_backend is not None:
            return self.get_base_weight()
        return getattr(self.get_base_layer(), name).data

    def _write(self, name: str, value: Tensor) -> None:
        if self.quantization_backend is not None:
            self.set_base_weight(value)
        else:
            getattr(self.get_base_layer(), name).data.copy_(value)

    def adapted_tensors(self) -> dict[str, Tensor]:
        """Return the base tensors that adapters change, as they are without any adapter."""
        return {
            name: self._backups.get(name, getattr(self.get_base_layer(), name))
            for name in self.adapted_names(self.scaling)
        }

    def _sum(self, name: str, weight: Tensor, adapters: Sequence[str]) -> Tensor:
        """Return W + Σ ΔW, added up in float32 or better and rounded once to the dtype of W."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(dtype)
        for adapter in adapters:
            delta = self._delta(adapter, name, dtype)
            if delta is not None:
                total = total + delta
        return total.to(weight.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of adapters to the base weights: W' = W + Σ ΔW.

        The sum is made from the original weights in float32 or better and rounded once, so that
        merging one after the other equals merging together. The originals are kept until
        `unmerge`, which restores them bit for bit.

        Args:
            safe_merge: check that the merged weights are finite before the layer is changed.
            adapter_names: the adapters to merge; None takes the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite, or the base layer is
                quantised in a way that cannot be merged into.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ValueError(
                f"adapters cannot be merged into {self.quantization_backend.backend_name} layers: "
                "load the base model without quantisation to merge"
            )
        together = [*self.merged_adapters, *names]
        originals: dict[str, Tensor] = {}
        merged: dict[str, Tensor] = {}
        for tensor in self.adapted_names(together):
            original = self._backups.get(tensor)
            originals[tensor] = self._read(tensor).clone() if original is None else original
            merged[tensor] = self._sum(tensor, originals[tensor], together)
            if safe_merge and not torch.isfinite(merged[tensor]).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to "
                    "be broken"
                )
        for tensor, value in merged.items():
            self._write(tensor, value)
        self._backups = originals
        self.merged_adapters = together

    def _restore(self) -> None:
        for tensor, value in self._backups.items():
            self._write(tensor, value)
        self._backups = {}

    def __repr__(self) -> str:
        return f"flora.{super().__repr__()}"


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

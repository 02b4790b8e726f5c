"""What FLoRA's layers share: bookkeeping of adapters, scales and merging."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.func import functional_call

from .config import FloraConfig
from .functional import chain_is_cheaper, init_tucker, resolve_ranks, tucker_weight
from .shapes import runs_as_defined, stride_product, weight_shape


class FloraLayer(nn.Module, BaseTunerLayer):
    """Base of the layers that carry FLoRA adapters.

    The tensors of an adapter are `flora_core[adapter]` and `flora_factor<n>[adapter]`, one factor
    for each axis of the weight.
    """

    other_param_names: tuple[str, ...] = ("r", "scale", "scaling", "uses_chain", "flora_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = ()
        self.r: dict[str, Any] = {}
        self.scale: dict[str, float] = {}  # as configured
        self.scaling: dict[str, float] = {}  # as applied; `set_scale` and `scale_layer` change it
        self.uses_chain: dict[str, bool] = {}
        self.flora_dropout = nn.ModuleDict()
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self._backups: dict[str, Tensor] = {}
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.training = base_layer.training

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

    def _present(self, adapter_names: Iterable[str]) -> list[str]:
        return [name for name in adapter_names if name in self.scaling]

    # Scales, as diffusers sets them.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times the configured one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.scale[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by `scale`."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by `scale`; None returns to the configured one."""
        for adapter in self._present(self.active_adapters):
            if scale is None:
                self.scaling[adapter] = self.scale[adapter]
            else:
                self.scaling[adapter] /= scale

    # Merging.

    @abstractmethod
    def _adapted_names(self, adapter_names: Iterable[str]) -> list[str]:
        """Return the names of the base tensors that the adapters change."""

    @abstractmethod
    def _delta(self, adapter: str, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return ΔW of one base tensor, computed in `dtype`; None where the adapter has none."""

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
            for name in self._adapted_names(self.scaling)
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
        originals, merged = {}, {}
        for tensor in self._adapted_names(together):
            originals[tensor] = self._backups.get(tensor)
            if originals[tensor] is None:
                originals[tensor] = self._read(tensor).clone()
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

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the base weights as they were before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for tensor, value in self._backups.items():
            self._write(tensor, value)
        self._backups = {}
        self.merged_adapters = []

    def _applied(self) -> list[str]:
        """Return the adapters to add on top of the base weights as they are now."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else self._present(self.active_adapters)

    def __repr__(self) -> str:
        return f"flora.{super().__repr__()}"


class FloraWeight(FloraLayer):
    """A FLoRA layer around a module with one weight.

    Args:
        base_layer: the module, possibly inside other tuner layers.
        adapter_name: name of the first adapter.
        config: its config.
        r, scale: its ranks and scale.
        weight_is_read: the parent reads `layer.weight` instead of calling the layer, as
            `nn.MultiheadAttention` does with its `out_proj` and the fast path of
            `nn.TransformerEncoderLayer` with its linear layers: `weight` then reads as W + ΔW.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: FloraConfig,
        r: int | Sequence[int],
        scale: float,
        weight_is_read: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        base = self.get_base_layer()
        self.weight_is_read = weight_is_read
        self._runs_as_defined = runs_as_defined(base)
        self._make_room(len(weight_shape(base)))
        self._prepare()
        self.update_layer(adapter_name, config, r, scale)

    def update_layer(
        self, adapter_name: str, config: FloraConfig, r: int | Sequence[int], scale: float
    ) -> None:
        """Add an adapter, or start one afresh; other adapters stay as they are."""
        base = self.get_base_layer()
        shape = weight_shape(base)
        ranks = resolve_ranks(r, shape)
        core, factors = init_tucker(shape, ranks, config.init_weights)
        self._prepare_factors(factors)
        self._enter_adapter(adapter_name, config, scale)
        self.r[adapter_name] = ranks
        self.flora_core[adapter_name] = nn.Parameter(core)
        for axis, factor in enumerate(factors):
            getattr(self, f"flora_factor{axis}")[adapter_name] = nn.Parameter(factor)
        # Decided here, once: a decision in forward would be one more thing to compile.
        self.uses_chain[adapter_name] = self._runs_as_defined and chain_is_cheaper(
            shape,
            ranks,
            groups=getattr(base, "groups", 1),
            stride=stride_product(base),
            one_op=self._can_run_as_one(base) and config.dropout == 0,
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _prepare(self) -> None:
        """Note what is particular to the layer's type, before the first adapter."""

    def _prepare_factors(self, factors: list[Tensor]) -> None:
        """Adjust freshly drawn factors to the layer."""

    def _tucker(self, adapter: str) -> tuple[Tensor, list[Tensor]]:
        core, *factors = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        return core, factors

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW of an adapter in the base weight's shape and the adapter's dtype."""
        return self._delta(adapter, "weight")

    def _adapted_names(self, adapter_names: Iterable[str]) -> list[str]:
        return ["weight"] if self._present(adapter_names) else []

    def _delta(self, adapter: str, name: str, dtype: torch.dtype | None = None) -> Tensor:
        core, factors = self._tucker(adapter)
        return dense_delta(core, factors, self.scaling[adapter], dtype)

    @property
    def weight(self) -> Tensor:
        """The base weight; W + ΔW where the parent reads it to compute with."""
        if self.weight_is_read and (adapters := self._applied()):
            return self._sum("weight", self.get_base_layer().weight, adapters)
        return super().weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base layer plus that of the active adapters.

        Args:
            x: the base layer's input.
            args, kwargs: the base layer's own, and `adapter_names` with one name for each entry
                of the batch ("__base__" for none).
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(x, *args, adapter_names=adapter_names, **kwargs)
        adapters = self._applied()
        if (
            adapters
            and self._can_run_as_one()
            and not any(
                self.uses_chain[a] or (self.training and a in self.flora_dropout) for a in adapters
            )
        ):
            weight = self._sum("weight", self.base_layer.weight, adapters)
            return functional_call(self.base_layer, {"weight": weight}, (x, *args), kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            result = self._add_branch(result, x, adapter)
        return result

    def _mixed_batch(
        self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> Tensor:
        """Run every entry of the batch with an adapter of its own."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs)
        for adapter in self._present(dict.fromkeys(adapter_names)):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            result[rows] = self._add_branch(result[rows], x[rows], adapter)
        return result

    def _can_run_as_one(self, base: nn.Module | None = None) -> bool:
        """Say whether the base layer may be run with W + ΔW in the place of W.

        Not when other tuner layers or hooks stand around it, nor in half precision, where W would
        swallow a small ΔW.
        """
        base = self.base_layer if base is None else base
        if not self._runs_as_defined:
            return True
        return (
            "weight" in base._parameters  # not quantised, flattened or parametrised
            and self.quantization_backend is None
            and not isinstance(self.base_layer, BaseTunerLayer)
            and base.weight.dtype in (torch.float32, torch.float64)
            and not hasattr(base, "_hf_hook")  # offloaded by accelerate
            and not hasattr(base.weight, "ds_id")  # partitioned by DeepSpeed
        )

    @abstractmethod
    def _add_branch(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """Return the base layer's result plus the adapter's part, in the dtype of the result."""

    def _branch_input(self, x: Tensor, adapter: str) -> Tensor:
        x = self._cast_input_dtype(x, self.flora_core[adapter].dtype)
        return self.flora_dropout[adapter](x) if adapter in self.flora_dropout else x


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

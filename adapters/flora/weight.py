"""FLoRA around a module with one weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graftune.adapters.base.layer_types import runs_as_defined
from graftune.adapters.base.parameter_layer import call_with, check_in_memory
from graftune.adapters.base.scaling import ScaledLayer
from graftune.adapters.flora.config import FloraConfig
from graftune.adapters.flora.functional import chain_is_cheaper, init_tucker, resolve_ranks
from graftune.adapters.flora.layer import FloraLayer, dense_delta
from graftune.adapters.flora.shapes import stride_product, weight_shape


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
        # Else the base layer computes in a way of its own: it can only be run with W + ΔW.
        self.has_branch = runs_as_defined(base)
        if not self.has_branch and isinstance(base_layer, BaseTunerLayer):
            raise TypeError(
                f"{type(base).__name__} computes in a way of its own and can be adapted by one "
                f"method only: there is a {type(base_layer).__name__} layer around it already"
            )
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
        self.uses_chain[adapter_name] = self.has_branch and self._is_chain_cheaper(
            shape, ranks, one_op=self._can_run_as_one() and config.dropout == 0
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _is_chain_cheaper(self, shape: Sequence[int], ranks: Sequence[int], one_op: bool) -> bool:
        base = self.get_base_layer()
        groups, stride = getattr(base, "groups", 1), stride_product(base)
        return chain_is_cheaper(shape, ranks, groups, stride, one_op)

    def _prepare(self) -> None:
        """Note what is particular to the layer's type, before the first adapter."""

    def _prepare_factors(self, factors: list[Tensor]) -> None:
        """Adjust freshly drawn factors to the layer."""

    def tensors(self, adapter: str, name: str = "weight") -> tuple[Tensor, list[Tensor]]:
        core, *factors = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        return core, factors

    def get_delta_weight(self, adapter: str, name: str | None = None) -> Tensor:
        """Return ΔW of an adapter in the base weight's shape and the adapter's dtype."""
        core, factors = self.tensors(adapter)
        return dense_delta(core, factors, self.scaling[adapter])

    # A call reads many attributes, which this keeps fast; PEFT's layers forward none either.
    __getattr__ = nn.Module.__getattr__

    def adapts(self, name: str, adapter: str) -> bool:
        """Say whether the adapter changes the parameter."""
        return name == "weight" and adapter in self.scaling

    def adapted_names(self, adapter_names: Iterable[str]) -> list[str]:
        return ["weight"] if self._present(adapter_names) else []

    @property
    def weight(self) -> Tensor:
        """The base weight; W + ΔW where the parent reads it to compute with."""
        if self.weight_is_read and (adapters := self._applied()):
            # Through another method's layer, which may read as a masked weight.
            return self._sum("weight", self.base_layer.weight, adapters)
        return super(ScaledLayer, self).weight  # as PEFT reads it: W, quantised or not

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
        for adapter in adapters:
            check_in_memory(self.tensors(adapter)[0], x)
        if adapters and self._runs_as_one(adapters):
            weight = self._sum("weight", self.base_layer.weight, adapters)
            return call_with(self.base_layer, {"weight": weight}, (x, *args), kwargs)
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

    def _runs_as_one(self, adapters: Sequence[str]) -> bool:
        """Say whether the base layer is run once, with W + ΔW of these adapters."""
        for adapter in adapters:
            drops = self.training and adapter in self.flora_dropout
            if self.uses_chain[adapter] or (drops and self.has_branch):
                return False
        return self._can_run_as_one()

    def _can_run_as_one(self) -> bool:
        """Say whether the base layer may be run with W + ΔW in the place of W.

        Not when other tuner layers or hooks stand around it, nor in half precision, where W would
        swallow a small ΔW. A layer without a branch has no other way.
        """
        base = self.base_layer
        return not self.has_branch or (
            "weight" in base._parameters  # not quantised, flattened or parametrised
            and self.quantization_backend is None
            and not isinstance(base, BaseTunerLayer)
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

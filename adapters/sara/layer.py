"""A module some entries of whose parameters are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graftune.adapters.base.layer_types import SUPPORTED
from graftune.adapters.base.parameter_layer import call_with
from graftune.adapters.sara.config import SaraConfig
from graftune.adapters.sara.places import Places
from graftune.adapters.sara.running import has_hooks, runner
from graftune.adapters.sara.values import SaraValues
from graftune.adapters.sara.weight import (
    CopiedWeight,
    OwnWeight,
    WeightInUse,
    WrittenWeight,
    is_own,
)

_KNOWN = {"output_size"}  # of what a module may be called with by name


class SaraLayer(SaraValues):
    """A module that runs with the trained values at their places, and W everywhere else.

    The weights of linear layers, convolutions and embeddings have the values in them from the first
    call on, until the adapter is switched off, deleted, or unloaded. Whatever else runs with a copy
    for as long as the call lasts, as do weights that others may read or replace: see `is_own`.
    Whoever reads an adapted parameter from outside gets it with the values in it; every other
    attribute is the module's own.

    Args:
        base_layer: the module.
        adapter_name: name of the first adapter.
        config: its config.
        places: by parameter, the entries that it trains.
    """

    base_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SaraConfig,
        places: Mapping[str, Places],
    ) -> None:
        if isinstance(base_layer, BaseTunerLayer):
            raise ValueError(
                f"parameters {list(places)} cannot be adapted: another method's "
                f"{type(base_layer).__name__} layer is wrapped around their module"
            )
        super().__init__(base_layer, adapter_name, config, places)
        self._run = runner(base_layer)
        if isinstance(base_layer, (*SUPPORTED, nn.MultiheadAttention)):
            self.in_features, self.out_features = _in_out_features(base_layer)

    def _set_owner(self, owner: nn.Module) -> None:
        self.base_layer = owner
        self.own_weight = OwnWeight(owner._parameters.get("weight"))

    @property
    def owner(self) -> nn.Module:
        """The module that the layer is around."""
        return self.base_layer

    def get_base_layer(self) -> nn.Module:
        """Return the module as the base model has it: whoever asks may take this layer off."""
        self.put_back()
        base: nn.Module = super().get_base_layer()
        return base

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether a LoRA on the same module can do the same: `peft.convert_to_lora` asks."""
        is_matrix = isinstance(self.base_layer, nn.Linear)
        return is_matrix and self.adapted_names([adapter_name]) == ["weight"]

    # Running.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the active adapters' values in its parameters."""
        adapters = self._applied()
        can_run = (
            self._run is not None
            and not has_hooks(self.base_layer)
            and not (kwargs.keys() - _KNOWN)
        )
        if not adapters:
            self.put_back()
            if can_run and self._is_kept_by_autograd():
                return self._run_sparsely(None, *args, **kwargs)
            return self.base_layer(*args, **kwargs)
        if can_run and len(adapters) == 1 and self.adapts("weight", adapters[0]):
            return self._run_sparsely(adapters[0], *args, **kwargs)
        self.put_back()
        tensors = {name: self._effective(name, adapters) for name in self.adapted_names(adapters)}
        return call_with(self.base_layer, tensors, args, kwargs)

    def _run_sparsely(self, adapter: str | None, *args: Any, **kwargs: Any) -> Any:
        bias = getattr(self.base_layer, "bias", None)
        values = places = None
        if adapter is not None:
            values, places = self._scaled(adapter, "weight"), self.places[adapter]["weight"]
            if self.adapts("bias", adapter):
                bias = self._effective("bias", [adapter])
        weight: WeightInUse
        if is_own(self.base_layer, self.own_weight):
            weight = WrittenWeight(
                self.own_weight, adapter, places, partial(self._without, "weight")
            )
        else:
            self.put_back(unless=[] if adapter is None else [adapter])
            weight = CopiedWeight(self.base_layer.weight, places)
        assert self._run is not None
        return self._run(self.base_layer, values, weight, bias, *args, **kwargs)

    def _is_kept_by_autograd(self) -> bool:
        """Say whether autograd would keep the weight, and refuse it once there are values in it."""
        return (
            torch.is_grad_enabled()
            and not self.merged
            and not isinstance(self.base_layer, nn.Embedding)
            and is_own(self.base_layer, self.own_weight)
            and not self.base_layer.weight.requires_grad
        )

    # The weight, with values in it.

    def put_back(self, unless: Sequence[str] = ()) -> None:
        """Put the base model's own values back into the weight, unless they may stay."""
        if self.own_weight.adapter not in (None, *unless):
            self.own_weight.put_back()

    def forget(self) -> None:
        """Put the base model's own values back; what the weight is then, is the base model's."""
        self.own_weight.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SaraLayer:
        super()._apply(fn, recurse)
        self.own_weight = OwnWeight(self.base_layer._parameters.get("weight"))
        return self

    def _own(self, name: str) -> Tensor:
        if name == "weight" and self.own_weight.adapter is not None:
            return self.own_weight.base()
        return super()._own(name)

    def _start(self, adapter: str, name: str) -> Tensor:
        if name == "weight" and self.own_weight.adapter == adapter:
            return self.own_weight.own(adapter)
        return super()._start(adapter, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not built yet: nothing to forward to
                raise
        return self.read(name)

    @property
    def weight(self) -> Tensor:
        """The module's own `weight`, with the values in it."""
        return self.read("weight")

    @property
    def bias(self) -> Tensor:
        """The module's own `bias`, with the values in it."""
        return self.read("bias")

    # Merging.

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without this layer and without those inside it."""
        for owner in list(self.base_layer.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, SaraLayer):
                    inner = child.unload_and_optionally_merge_module(
                        merge, safe_merge, adapter_names
                    )
                    setattr(owner, name, inner)
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        self.put_back()
        return self.base_layer

    def __repr__(self) -> str:
        return f"sara.{super().__repr__()}"


def _in_out_features(module: Any) -> tuple[int, int]:
    """Return the sizes that PEFT asks of every layer of a usual type."""
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    for names in (("in_channels", "out_channels"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, names[0]):
            return getattr(module, names[0]), getattr(module, names[1])
    is_in_out = hasattr(module, "nx")  # transformers' Conv1D
    return (module.nx, module.nf) if is_in_out else (module.in_features, module.out_features)

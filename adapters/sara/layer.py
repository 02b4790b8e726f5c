"""A module some entries of whose parameters are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..layer_types import SUPPORTED
from ..substitute import call_with
from .config import SaraConfig
from .places import Places
from .running import has_hooks, runner
from .values import SaraValues, writing
from .weight import CopiedWeight, WeightInUse, WrittenWeight, is_own, state_of


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
        if not adapters:
            return self._run_base(*args, **kwargs)
        if len(adapters) == 1 and self.adapts("weight", adapters[0]) and self._can_run():
            (adapter,) = adapters
            bias = getattr(self.base_layer, "bias", None)
            if self.adapts("bias", adapter):
                bias = self._effective("bias", adapters)
            weight = self._weight_in_use(adapter)
            assert self._run is not None
            values = self._scaled(adapter, "weight")
            return self._run(self.base_layer, values, weight, bias, *args, **kwargs)
        self.put_back()
        tensors = {name: self._effective(name, adapters) for name in self.adapted_names(adapters)}
        return call_with(self.base_layer, tensors, args, kwargs)

    def _run_base(self, *args: Any, **kwargs: Any) -> Any:
        self.put_back()
        weight: Any = self.base_layer._parameters.get("weight")
        is_kept = torch.is_grad_enabled() and not isinstance(self.base_layer, nn.Embedding)
        may_change = self._can_run() and not self.merged and is_own(self.base_layer)
        if not (is_kept and may_change) or weight.requires_grad:
            return self.base_layer(*args, **kwargs)
        # Autograd would refuse a weight that it keeps once there are values in it.
        assert self._run is not None
        bias = getattr(self.base_layer, "bias", None)
        in_use = WrittenWeight(self, weight, None, None)
        return self._run(self.base_layer, None, in_use, bias, *args, **kwargs)

    def _can_run(self) -> bool:
        return self._run is not None and not has_hooks(self.base_layer)

    # The weight, with values in it.

    def _weight_in_use(self, adapter: str) -> WeightInUse:
        places, weight = self.places[adapter]["weight"], self.base_layer.weight
        if is_own(self.base_layer):
            return WrittenWeight(self, weight, adapter, places)
        if self._holds_others("weight", adapter):
            self.put_back()
        return CopiedWeight(weight, places)

    def hold(self, adapter: str | None, values: Tensor | None) -> None:
        """Write an adapter's values into the weight, or put the base model's own back (None)."""
        weight: Any = self.base_layer.weight
        # What is kept in inference mode would be of no use to autograd.
        with writing, torch.inference_mode(False), torch.no_grad():
            if adapter is None or self._holds_others("weight", adapter):
                self.put_back()
            if adapter is not None:
                assert values is not None
                self._keep_originals([(adapter, "weight")])
                self.places[adapter]["weight"].write(weight.detach(), values)
            self._held = state_of(adapter, values, weight)

    def holds(self, adapter: str | None, values: Tensor | None) -> bool:
        """Say whether the weight is as `hold` with the same values has left it."""
        return self._held == state_of(adapter, values, self.base_layer.weight)

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

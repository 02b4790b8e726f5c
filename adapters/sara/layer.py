"""A module some entries of whose parameters are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..layer_types import SUPPORTED
from ..substitute import call_with
from .config import SaraConfig
from .places import Places
from .running import has_hooks, runner
from .values import SaraValues


class SaraLayer(SaraValues):
    """A module that runs with the trained values at their places, and W everywhere else.

    Each call puts the values into a copy of the weight, a block of rows at a time for linear
    layers, convolutions and embeddings, and for as long as the call lasts for whatever else.
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

    def _hold(self, owner: nn.Module) -> None:
        self.base_layer = owner

    @property
    def owner(self) -> nn.Module:
        """The module that the layer is around."""
        return self.base_layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether a LoRA on the same module can do the same: `peft.convert_to_lora` asks."""
        is_matrix = isinstance(self.base_layer, nn.Linear)
        return is_matrix and self.adapted_names([adapter_name]) == ["weight"]

    # Running.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the active adapters' values in its parameters."""
        adapters = self._applied()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        if len(adapters) == 1 and self._runs_sparsely(adapters[0]):
            (adapter,) = adapters
            bias = getattr(self.base_layer, "bias", None)
            if self.adapts("bias", adapter):
                bias = self._effective("bias", adapters)
            values, places = self._scaled(adapter, "weight"), self.places[adapter]["weight"]
            assert self._run is not None
            return self._run(self.base_layer, values, places, bias, *args, **kwargs)
        tensors = {name: self._effective(name, adapters) for name in self.adapted_names(adapters)}
        return call_with(self.base_layer, tensors, args, kwargs)

    def _runs_sparsely(self, adapter: str) -> bool:
        return (
            self._run is not None
            and self.adapts("weight", adapter)
            and not has_hooks(self.base_layer)
        )

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

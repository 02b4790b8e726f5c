"""A module some entries of whose parameters are trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..layer_types import SUPPORTED
from ..offloaded import check_in_memory
from ..scaling import ScaledLayer
from ..sparse_parts import SparsePart
from ..substitute import call_with
from .autograd import SparseTensor
from .config import SaraConfig
from .functional import outside
from .places import Places
from .running import has_hooks, runner


class SaraLayer(nn.Module, ScaledLayer):
    """A module that runs with the trained values at their places, and W everywhere else.

    The base module's weights are never written to, except by `merge`: each call puts the values
    into a copy, a block of rows at a time for linear layers, convolutions and embeddings, and for
    as long as the call lasts for whatever else. Whoever reads an adapted parameter from outside
    gets it with the values in it; every other attribute is the module's own.

    An adapter's tensors are `sara_values[adapter][name]`, of shape (n,), for each of the module's
    own parameters that has trained entries.

    Args:
        base_layer: the module.
        adapter_name: name of the first adapter.
        config: its config.
        places: by parameter, the entries that it trains.
    """

    base_layer: Any
    adapter_layer_names: tuple[str, ...] = ("sara_values",)
    other_param_names: tuple[str, ...] = ("places", "rules", "scale", "scaling")

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
        super().__init__()
        self.base_layer = base_layer
        self.sara_values = nn.ModuleDict()
        self.places: dict[str, dict[str, Places]] = {}
        self.rules: dict[str, tuple[str, float]] = {}  # how entries were selected, and the cutoff
        self.scale, self.scaling = {}, {}
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self._originals: dict[tuple[str, str], Tensor] = {}
        self._run = runner(base_layer)
        if isinstance(base_layer, (*SUPPORTED, nn.MultiheadAttention)):
            self.in_features, self.out_features = _in_out_features(base_layer)
        self.training = base_layer.training
        self.update_layer(adapter_name, config, places)

    # Adapters.

    def update_layer(
        self, adapter_name: str, config: SaraConfig, places: Mapping[str, Places]
    ) -> None:
        """Add an adapter, or start one afresh; other adapters stay as they are.

        Without places it waits for those that a file lists: for another `update_layer`.
        """
        self.rules[adapter_name] = (config.select, config.cutoff or 0.0)
        self.places[adapter_name] = {}
        if not places:
            return
        self.scale[adapter_name] = self.scaling[adapter_name] = 1.0
        self.sara_values[adapter_name] = nn.ParameterDict()
        for name, of_name in places.items():
            values = self._original_entries(of_name, name)
            if not config.init_weights:
                values = values + _noise_like(values, getattr(self.base_layer, name))
            self._enter(adapter_name, name, of_name, values)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _enter(self, adapter: str, name: str, places: Places, values: Tensor) -> None:
        self.places[adapter][name] = places
        self.sara_values[adapter][name] = nn.Parameter(values)  # type: ignore[operator]

    def values(self, adapter: str, name: str) -> Tensor:
        """Return an adapter's trained values in one parameter, (n,)."""
        return self.sara_values[adapter][name]  # type: ignore[index]

    def adapted_names(self, adapter_names: Iterable[str]) -> list[str]:
        """Return the parameters that any of the adapters changes."""
        names = (name for adapter in self._present(adapter_names) for name in self.places[adapter])
        return list(dict.fromkeys(names))

    def adapts(self, name: str, adapter: str) -> bool:
        """Say whether the adapter changes the parameter."""
        return name in self.places.get(adapter, ())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SaraLayer:
        super()._apply(fn, recurse)
        self.places = {
            adapter: {name: places.moved(fn) for name, places in by_name.items()}
            for adapter, by_name in self.places.items()
        }
        self._originals = {key: fn(tensor) for key, tensor in self._originals.items()}
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # The device only: values keep a precision of their own beside a base in half precision.
        for name, places in self.places.get(adapter_name, {}).items():
            values = self.values(adapter_name, name)
            to = device or getattr(self.base_layer, name).device
            if not (values.is_meta or to.type == "meta"):
                values.data = values.data.to(to)
                self.places[adapter_name][name] = places.moved(partial(Tensor.to, device=to))

    # What an adapter does to a parameter.

    def _original_entries(self, places: Places, name: str) -> Tensor:
        return places.take(getattr(self.base_layer, name).detach())

    def _start(self, adapter: str, name: str) -> Tensor:
        """Return the base model's own values at an adapter's places, (n,)."""
        if (adapter, name) in self._originals:
            return self._originals[adapter, name]
        return self._original_entries(self.places[adapter][name], name)

    def _scaled(self, adapter: str, name: str) -> Tensor:
        """Return the values that the module runs with: w + s · (v - w)."""
        values, scale = self.values(adapter, name), self.scaling[adapter]
        check_in_memory(values)
        if scale == 1:
            return values
        start = self._start(adapter, name).to(values.dtype)
        return start + scale * (values - start)

    def _effective(self, name: str, adapters: Sequence[str]) -> Tensor:
        """Return a parameter with the adapters' values in it, W + Σ ΔW where they overlap."""
        weight = getattr(self.base_layer, name)
        first, *others = (adapter for adapter in adapters if self.adapts(name, adapter))
        dtype = torch.promote_types(weight.dtype, torch.float32) if others else weight.dtype
        total = SparseTensor.apply(
            self._scaled(first, name), weight.to(dtype), self.places[first][name]
        )
        for adapter in others:
            change = self._change(adapter, name).to(dtype)
            at = self.places[adapter][name].indices()
            total = total.reshape(-1).index_add(0, at, change).reshape(weight.shape)
        return total.to(weight.dtype)

    def _change(self, adapter: str, name: str) -> Tensor:
        values = self._scaled(adapter, name)
        return values - self._start(adapter, name).to(values.dtype)

    def _delta(self, adapter: str, name: str) -> Tensor:
        return self.places[adapter][name].dense(self._change(adapter, name))

    def weight_changes(self, adapter: str) -> dict[str, Callable[[], Tensor]]:
        """Return by parameter what computes ΔW of an adapter with gradients."""
        return {name: partial(self._delta, adapter, name) for name in self.adapted_names([adapter])}

    def get_delta_weight(self, adapter: str, name: str = "weight") -> Tensor:
        """Return ΔW of an adapter for one parameter, zero where it trains nothing."""
        if not self.adapts(name, adapter):
            raise ValueError(
                f"the adapter {adapter!r} does not change {name!r}, only "
                f"{self.adapted_names([adapter])}"
            )
        return self._delta(adapter, name)

    def sparse_parts(self, key: str, adapter: str) -> Iterator[SparsePart]:
        """Yield what an adapter trains of the module's parameters.

        Args:
            key: the layer's name in the model.
            adapter: the adapter's name.
        """
        select, cutoff = self.rules.get(adapter, ("random", 0.0))
        for name, places in self.places.get(adapter, {}).items():
            values: Any = self.values(adapter, name)
            yield SparsePart(
                f"{key}.sara_values.{adapter}.{name}",
                values,
                places.shape,
                places.dense,
                places.take,
                partial(outside, cutoff=cutoff, select=select),
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether a LoRA on the same module can do the same: `peft.convert_to_lora` asks."""
        is_matrix = isinstance(self.base_layer, nn.Linear)
        return is_matrix and self.adapted_names([adapter_name]) == ["weight"]

    def adapted_tensors(self) -> dict[str, Tensor]:
        """Return the module's own tensors, as they are without any adapter.

        All of them, so that they are the same whatever other adapters there are.
        """
        own = (name for name, _ in self.base_layer.named_parameters(recurse=False))
        return {name: self._without(name) for name in own}

    def _without(self, name: str) -> Tensor:
        weight: Tensor = getattr(self.base_layer, name).detach()
        for (adapter, of), values in self._originals.items():
            if of == name:
                weight = self.places[adapter][name].put(weight, values, weight.dtype)
        return weight

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

    def _applied(self) -> list[str]:
        """Return the adapters whose values are to be put into the weights as they are now."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else self._present(self.active_adapters)

    def _read(self, name: str) -> Any:
        adapters = [adapter for adapter in self._applied() if self.adapts(name, adapter)]
        return self._effective(name, adapters) if adapters else getattr(self.base_layer, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not built yet: nothing to forward to
                raise
        return self._read(name)

    @property
    def weight(self) -> Tensor:
        """The module's own `weight`, with the values in it."""
        return self._read("weight")

    @property
    def bias(self) -> Tensor:
        """The module's own `bias`, with the values in it."""
        return self._read("bias")

    # Merging.

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters' values into the base weights.

        The base model's own values at these places are kept until `unmerge`, which puts them back
        bit for bit. Merging one after the other equals merging together.

        Args:
            safe_merge: check that the values are finite before the layer is changed.
            adapter_names: the adapters to merge; None takes the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        for adapter in names if safe_merge else ():
            if any(not torch.isfinite(v).all() for v in self.sara_values[adapter].parameters()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
                )
        together = [*self.merged_adapters, *names]
        self._restore()
        merged = {name: self._effective(name, together) for name in self.adapted_names(together)}
        self._originals = {
            (adapter, name): self._start(adapter, name)
            for adapter in together
            for name in self.places[adapter]
        }
        for name, weight in merged.items():
            getattr(self.base_layer, name).data.copy_(weight)
        self.merged_adapters = together

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the base model's own values, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters = []

    def _restore(self) -> None:
        for (adapter, name), values in self._originals.items():
            weight = getattr(self.base_layer, name)
            weight.data.copy_(self.places[adapter][name].put(weight.data, values, weight.dtype))
        self._originals = {}

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


def _noise_like(values: Tensor, weight: Tensor) -> Tensor:
    """Return noise as large as a tensor's weights, or 0.1 where these are zero: for tests."""
    size = float(weight.detach().float().square().mean().sqrt()) or 0.1
    return size * torch.randn(values.shape).to(values)

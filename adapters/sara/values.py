"""Some entries of a module's own parameters, trained: their values, places and originals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from graftune.adapters.base.parameter_layer import check_in_memory
from graftune.adapters.base.scaling import ScaledLayer
from graftune.adapters.base.sparse_parts import SparsePart
from graftune.adapters.sara.autograd import SparseTensor
from graftune.adapters.sara.config import SaraConfig
from graftune.adapters.sara.functional import outside
from graftune.adapters.sara.places import Places


class SaraValues(nn.Module, ScaledLayer):
    """What adapters train of the parameters that one module owns.

    An adapter's tensors are `sara_values[adapter][name]`, of shape (n,), for each of the module's
    own parameters that has trained entries. While a weight has an adapter's values in it, merged or
    to run with them, the original values are kept beside it and are put back bit for bit.

    Args:
        owner: the module.
        adapter_name: name of the first adapter.
        config: its config.
        places: by parameter, the entries that it trains.
    """

    adapter_layer_names: tuple[str, ...] = ("sara_values",)
    other_param_names: tuple[str, ...] = ("places", "rules", "scale", "scaling")

    def __init__(
        self,
        owner: nn.Module,
        adapter_name: str,
        config: SaraConfig,
        places: Mapping[str, Places],
    ) -> None:
        super().__init__()
        self._set_owner(owner)
        self.sara_values = nn.ModuleDict()
        self.places: dict[str, dict[str, Places]] = {}
        self.rules: dict[str, tuple[str, float]] = {}  # how entries were selected, and the cutoff
        self.scale, self.scaling = {}, {}
        self.merged_adapters = []
        self._originals: dict[tuple[str, str], Tensor] = {}  # of what is merged
        self.training = owner.training
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, places)

    @abstractmethod
    def _set_owner(self, owner: nn.Module) -> None:
        """Keep the module as `owner`; as a module of this one, it comes before the values."""

    @property
    @abstractmethod
    def owner(self) -> nn.Module:
        """The module whose parameters they are."""

    def base_parameter(self, name: str) -> Any:
        """Return one of the module's own parameters, as it is without adapters' values in it."""
        return getattr(self.owner, name)

    # Adapters.

    def update_layer(
        self, adapter_name: str, config: SaraConfig, places: Mapping[str, Places]
    ) -> None:
        """Add an adapter, or start one afresh; other adapters stay as they are.

        Without places it waits for those that a file lists: for another `update_layer`.
        """
        self.forget()
        self.rules[adapter_name] = (config.select, config.cutoff or 0.0)
        self.places[adapter_name] = {}
        if not places:
            return
        self.scale[adapter_name] = self.scaling[adapter_name] = 1.0
        self.sara_values[adapter_name] = nn.ParameterDict()
        for name, of_name in places.items():
            values = self._original_entries(of_name, name)
            if not config.init_weights:
                values = values + _noise_like(values, self.base_parameter(name))
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

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters."""
        super().set_adapter(adapter_names, inference_mode)
        self.put_back(unless=self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Run with the active adapters, or as the base model does."""
        super().enable_adapters(enabled)
        if not enabled:
            self.put_back()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        self.forget()
        super().delete_adapter(adapter_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SaraValues:
        self.forget()
        self._originals = {key: fn(self._original(*key)) for key in self._originals}
        super()._apply(fn, recurse)
        self.places = {
            adapter: {name: places.moved(fn) for name, places in by_name.items()}
            for adapter, by_name in self.places.items()
        }
        return self

    # A state dict is the base model's and the adapters' own: nothing of one stands in the other.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state, with the base model's own values in its weights unless merged."""
        self.put_back()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # The device only: values keep a precision of their own beside a base in half precision.
        for name, places in self.places.get(adapter_name, {}).items():
            values = self.values(adapter_name, name)
            to = device or self.base_parameter(name).device
            if not (values.is_meta or to.type == "meta"):
                values.data = values.data.to(to)
                self.places[adapter_name][name] = places.moved(partial(Tensor.to, device=to))

    # What an adapter does to a parameter.

    def _original_entries(self, places: Places, name: str) -> Tensor:
        return places.take(self.base_parameter(name).detach())

    def _start(self, adapter: str, name: str) -> Tensor:
        """Return the base model's own values at an adapter's places, (n,)."""
        if (adapter, name) in self._originals:
            return self._original(adapter, name)
        return self.places[adapter][name].take(self._without(name))

    def _original(self, adapter: str, name: str) -> Tensor:
        return self._originals[adapter, name].to(self.base_parameter(name).device)

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
        first, *others = (adapter for adapter in adapters if self.adapts(name, adapter))
        self.put_back(unless=[] if others else [first])
        weight = self.base_parameter(name)
        dtype = torch.promote_types(weight.dtype, torch.float32) if others else weight.dtype
        total = SparseTensor.apply(
            self._scaled(first, name), weight.to(dtype), self.places[first][name]
        )
        for adapter in others:
            change = self._change(adapter, name).to(dtype)
            at = self.places[adapter][name].indices()
            total = total.reshape(-1).index_add(0, at, change).reshape(weight.shape)
        return total.to(weight.dtype)

    def _change(self, adapter: str, name: str, dtype: torch.dtype | None = None) -> Tensor:
        values = self._scaled(adapter, name).to(dtype)
        return values - self._start(adapter, name).to(values.dtype)

    def weight_changes(self, adapter: str) -> dict[str, Callable[[], Tensor]]:
        """Return by parameter what computes ΔW of an adapter with gradients."""
        names = self.adapted_names([adapter])
        return {name: partial(self.get_delta_weight, adapter, name) for name in names}

    def get_delta_weight(
        self, adapter: str, name: str = "weight", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return ΔW of an adapter for one parameter, zero where it trains nothing.

        Args:
            adapter: the adapter's name.
            name: the parameter's name.
            dtype: to compute it in; None for the values' own.

        Raises:
            ValueError: the adapter does not change the parameter.
        """
        if not self.adapts(name, adapter):
            raise ValueError(
                f"the adapter {adapter!r} does not change {name!r}, only "
                f"{self.adapted_names([adapter])}"
            )
        return self.places[adapter][name].dense(self._change(adapter, name, dtype))

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

    def adapted_tensors(self) -> dict[str, Tensor]:
        """Return the module's own tensors, as they are without any adapter.

        All of them, so that they are the same whatever other adapters there are.
        """
        own = (name for name, _ in self.owner.named_parameters(recurse=False))
        return {name: self._without(name) for name in own}

    def _own(self, name: str) -> Tensor:
        """Return a parameter without the values that it holds to run with."""
        parameter: Tensor = self.base_parameter(name)
        return parameter.detach()

    def _without(self, name: str) -> Tensor:
        weight = self._own(name)
        for adapter, of in self._originals:
            if of == name:
                values = self._original(adapter, name)
                weight = self.places[adapter][name].put(weight, values, weight.dtype)
        return weight

    # Reading.

    def read(self, name: str) -> Any:
        """Return one of the module's parameters, with the active adapters' values in it."""
        adapters = [adapter for adapter in self._applied() if self.adapts(name, adapter)]
        if adapters:
            return self._effective(name, adapters)
        if name == "weight":
            self.put_back()
        return self.base_parameter(name)

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
        self.put_back()
        self._restore()
        merged = {name: self._effective(name, together) for name in self.adapted_names(together)}
        self._originals = {
            (adapter, name): self._start(adapter, name)
            for adapter in together
            for name in self.places[adapter]
        }
        for name, weight in merged.items():
            self.base_parameter(name).detach().copy_(weight)  # not `.data`: graphs have to notice
        self.merged_adapters = together

    @torch.no_grad()
    def _restore(self) -> None:
        for adapter, name in self._originals:
            weight = self.base_parameter(name).detach()
            self.places[adapter][name].write(weight, self._original(adapter, name))
        self._originals = {}

    # What weights hold to run with: nothing, unless a class says otherwise.

    def put_back(self, unless: Sequence[str] = ()) -> None:
        """Put the base model's own values back into weights that run with an adapter's.

        Args:
            unless: adapters whose values may stay.
        """

    def forget(self) -> None:
        """Put the base model's own values back; what the weights are then, is the base model's."""


def _noise_like(values: Tensor, weight: Tensor) -> Tensor:
    """Return noise as large as a tensor's weights, or 0.1 where these are zero: for tests."""
    size = float(weight.detach().float().square().mean().sqrt()) or 0.1
    return size * torch.randn(values.shape).to(values)

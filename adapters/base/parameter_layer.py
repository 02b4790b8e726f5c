"""The one layer that runs a module with other tensors in place of its parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from graftune.adapters.base.scaling import ScaledLayer

# Offloading libraries set these on single modules and delete them there.
_NOT_FORWARDED = ("base_layer", "_hf_hook", "_old_forward")


class ParameterLayer(nn.Module, ScaledLayer):
    """A module that runs with W' in place of some of its parameters W.

    A method defines `method`, `adapted_names`, `adapts` and `effective`. Nothing is left on the
    module: each call substitutes the tensors for its duration. Code that reads an adapted parameter
    from outside, as PyTorch's attention fast path does, gets W' as well; every other attribute is
    the module's.

    Args:
        base_layer: the module, possibly inside other tuner layers.
        adapter_name: name of the first adapter.
    """

    method: str  # only layers of one method are unloaded together
    base_layer: Any  # a module of whatever type is adapted

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scale, self.scaling = {}, {}
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self._originals: dict[str, Tensor] = {}  # values that merging has overwritten, by parameter
        self.training = base_layer.training

    def get_base_layer(self) -> Any:
        """Return the base module, without any tuner layers around it."""
        return super().get_base_layer()

    # What a method defines.

    @abstractmethod
    def adapted_names(self, adapter_names: Iterable[str]) -> list[str]:
        """Return the names of the parameters that any of the adapters changes."""

    @abstractmethod
    def adapts(self, name: str, adapter: str) -> bool:
        """Say whether the adapter changes the parameter."""

    @abstractmethod
    def effective(self, name: str, adapters: Sequence[str]) -> Tensor:
        """Return W' of one parameter with the given adapters, made from `original(name)`.

        It has W's dtype, and gradients to the adapters' tensors.
        """

    # The base module's parameters.

    def base_tensor(self, name: str) -> Any:
        """Return a parameter of the base module as it is now, merged or not."""
        return getattr(self.get_base_layer(), name)

    def original(self, name: str) -> Tensor:
        """Return a parameter of the base module as it is without any adapter of this layer."""
        kept = self._originals.get(name)
        return self.base_tensor(name) if kept is None else kept

    def adapted_tensors(self) -> dict[str, Tensor]:
        """Return the base tensors that adapters change, as they are without any adapter."""
        return {
            name: self._originals.get(name, self.base_tensor(name))
            for name in self.adapted_names(self.scaling)
        }

    # Running and reading.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with W' of the active adapters."""
        adapters = self._applied()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        tensors = {name: self.effective(name, adapters) for name in self.adapted_names(adapters)}
        return self.call_base(tensors, args, kwargs)

    def call_base(
        self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the base layer with other tensors in place of the base module's parameters."""
        prefix, layer = "", self.base_layer
        while isinstance(layer, BaseTunerLayer):  # another method's, between this and the base
            prefix, layer = f"{prefix}base_layer.", layer.base_layer  # type: ignore[attr-defined]
        laid_over = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        return call_with(self.base_layer, laid_over, args, kwargs)

    def read(self, name: str) -> Any:
        """Return an attribute of the module, W' where it is an adapted parameter."""
        if any(self.adapts(name, adapter) for adapter in self.scaling):
            adapters = [adapter for adapter in self._applied() if self.adapts(name, adapter)]
            if adapters:
                effective = self.effective(name, adapters)
                if not isinstance(self.base_layer, BaseTunerLayer):
                    return effective
                # What another method's layer in between adds is added to W'.
                return effective + (getattr(self.base_layer, name) - self.base_tensor(name))
        return getattr(self.base_layer, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_FORWARDED:
                raise
        return self.read(name)

    @property
    def weight(self) -> Tensor:
        """The module's `weight`, W' if it is among the adapted parameters."""
        return self.read("weight")

    @property
    def bias(self) -> Tensor:
        """The module's `bias`, W' if it is among the adapted parameters."""
        return self.read("bias")

    # The change of each parameter.

    def _delta(self, adapter: str, name: str) -> Tensor | None:
        return self.effective(name, [adapter]) - self.original(name)

    def get_delta_weight(self, adapter: str, name: str | None = None) -> Tensor:
        """Return ΔW of an adapter for one parameter, whose name may be left out if it is alone.

        Raises:
            ValueError: the adapter changes several parameters, or not the given one.
        """
        names = self.adapted_names([adapter])
        if name is None and len(names) > 1:
            raise ValueError(
                f"the adapter {adapter!r} changes several parameters: name one of {names}"
            )
        name = names[0] if name is None and names else name
        delta = self._delta(adapter, name) if name in names else None
        if delta is None:
            raise ValueError(f"the adapter {adapter!r} does not change {name!r}, only {names}")
        return delta

    def weight_changes(self, adapter: str) -> dict[str, Callable[[], Tensor | None]]:
        """Return by parameter what computes ΔW = W' − W of an adapter with gradients."""
        return {name: partial(self._delta, adapter, name) for name in self.adapted_names([adapter])}

    # Merging.

    def check_mergeable(self, adapter_names: Iterable[str]) -> None:
        """Raise ValueError if any of the adapters cannot be merged as it is."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W' of adapters into the base module's parameters.

        W' is made from the original values and rounded once, so that merging one after the other
        equals merging together. The originals are kept until `unmerge`, which restores them bit for
        bit.

        Args:
            safe_merge: check that the merged weights are finite before the layer is changed.
            adapter_names: the adapters to merge; None takes the active ones.

        Raises:
            ValueError: an adapter cannot be merged as it is, or `safe_merge` found values that are
                not finite. The layer is then as it was.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        self.check_mergeable(names)
        together = [*self.merged_adapters, *names]
        originals: dict[str, Tensor] = {}
        merged: dict[str, Tensor] = {}
        for name in self.adapted_names(together):
            kept = self._originals.get(name)
            originals[name] = self.original(name).detach().clone() if kept is None else kept
            merged[name] = self.effective(name, together)
            if safe_merge and not torch.isfinite(merged[name]).all():
                raise ValueError(broken(names))
        for name, value in merged.items():
            self._write(name, value)
        self._originals = originals
        self.merged_adapters = together

    def _write(self, name: str, value: Tensor) -> None:
        self.base_tensor(name).data.copy_(value)

    def _restore(self) -> None:
        for name, value in self._originals.items():
            self._write(name, value)
        self._originals = {}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without this layer and without those of its method inside it."""
        inner = list(self._inner_layers(self.base_layer))
        for layer in (*(layer for *_, layer in inner), self):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for parent, name, layer in inner:
            setattr(parent, name, layer.base_layer)
        return self.base_layer

    def _inner_layers(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, ParameterLayer]]:
        for name, child in list(module.named_children()):
            if isinstance(child, ParameterLayer) and child.method == self.method:
                yield module, name, child
            yield from self._inner_layers(child)

    def __repr__(self) -> str:
        return f"{self.method}.{super().__repr__()}"


def broken(adapters: Sequence[str]) -> str:
    """Return the error for adapters whose merged weights are not finite."""
    return (
        f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be "
        "broken: the training diverged. Use an earlier checkpoint"
    )


def call_with(
    module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module with other tensors in the place of some of its parameters.

    Args:
        module: the module to call.
        tensors: by the parameters' names within the module, dotted where they are further inside.
        args, kwargs: what it is called with.

    Example:
        >>> call_with(nn.Linear(2, 1, bias=False), {"weight": torch.ones(1, 2)}, (x,), {})
    """
    owners = {name: _owner(module, name) for name in tensors}
    # FSDP lays gathered weights over the parameters, where `functional_call` does not reach.
    laid_over = {
        name: (owner, owner.__dict__[own_name])
        for name, (owner, own_name) in owners.items()
        if own_name in owner.__dict__
    }
    plain = all(own_name in owner._parameters for owner, own_name in owners.values())
    # Laying them over costs next to nothing; a graph that is traced knows `functional_call`.
    if not laid_over and (torch.compiler.is_compiling() or not plain):
        return functional_call(module, tensors, args, kwargs)
    for name, tensor in tensors.items():
        owner, own_name = owners[name]
        owner.__dict__[own_name] = tensor
    try:
        return module(*args, **kwargs)
    finally:
        for owner, own_name in owners.values():
            del owner.__dict__[own_name]
        for name, (owner, value) in laid_over.items():
            owner.__dict__[owners[name][1]] = value


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own_name = name.rpartition(".")
    return (module.get_submodule(path) if path else module), own_name


def check_in_memory(tensor: Tensor, x: Tensor | None = None) -> None:
    """Raise where an adapter's tensor has no values while the input has.

    Offloading by single modules brings in the weights of modules that are called; an adapter's
    tensors stand in containers that never are.

    Args:
        tensor: of the adapter.
        x: the layer's input, which may be without values as well; None: there has to be some.

    Raises:
        RuntimeError: the tensor is on the meta device.
    """
    if tensor.is_meta and not (x is not None and x.is_meta):
        raise RuntimeError(
            "the adapter's tensors are not in memory: weights are offloaded one by one, as by "
            "`pipeline.enable_sequential_cpu_offload()` or `accelerate.cpu_offload(model)`, which "
            "brings back only those of modules that are called. Offload whole models, by "
            "`pipeline.enable_model_cpu_offload()`, or groups, by "
            "`model.enable_group_offload(...)`; or merge the adapter first"
        )

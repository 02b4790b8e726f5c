"""Adapters that enter a model by hooks: parameters that stand beside the modules they act on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graftune.adapters.base.modules import base_modules
from graftune.adapters.base.tuner import GraftTuner

NO_MERGE = (
    "prompts are tokens and not a change of the weights, so there is nothing to merge: keep the "
    "adapter attached, or take it off with `unload()`"
)


class HookedLayer(nn.Module, BaseTunerLayer):
    """Base of tuner layers that are children of a module and change what it computes by hooks.

    A layer keeps its tensors in dictionaries by adapter, which it lists in `adapter_layer_names`.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._handles: list[Any] = []

    # Hooks.

    def hook_input(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a hook that is called with a module, its arguments and its keywords."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def hook_output(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a hook that is called with a module, its arguments and its output."""
        self._handles.append(module.register_forward_hook(hook))

    def unhook(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # Adapters.

    def stand_beside(self, module: nn.Module) -> None:
        """Say which module's parameters identify the base model and where tensors belong."""
        # Known, and not a child: it has a parent already.
        self.__dict__["beside"] = module
        self.train(module.training)

    def activate(self, adapter_name: str, inference_mode: bool) -> None:
        """Place the tensors of an adapter that was just added; the first one becomes active."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        base: Tensor = next(self.__dict__["beside"].parameters())
        dtype = base.dtype if base.is_floating_point() else None
        for name in self.adapter_layer_names:
            parameter = getattr(self, name).get(adapter_name)
            if parameter is not None and not (parameter.is_meta or base.is_meta):
                parameter.data = parameter.data.to(device or base.device, dtype)

    def current(self) -> str | None:
        """Return the name of the adapter to use; None where there is none.

        Raises:
            ValueError: more than one adapter is active.
        """
        if self.disable_adapters:
            return None
        tensors = getattr(self, self.adapter_layer_names[0])
        active = [name for name in self.active_adapters if name in tensors]
        if len(active) > 1:
            raise ValueError(
                f"the prompts of {active} take the same places, so one adapter at a time can be "
                "active: call `set_adapter` with one name"
            )
        return active[0] if active else None

    def adapted_tensors(self) -> dict[str, Tensor]:
        """Return the base model's own tensors that identify what the layer stands beside."""
        beside: nn.Module = self.__dict__["beside"]
        modules = [("", beside), *base_modules(beside)]
        return {
            f"{key}.{name}".removeprefix("."): parameter.detach()
            for key, module in modules
            for name, parameter in module.named_parameters(recurse=False)
        }

    # Merging.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: there is no weight to merge into."""
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""


class HookedTuner(GraftTuner):
    """Base of tuners whose layers are `HookedLayer`s; `child` is their name in their parents."""

    child = ""
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (as PEFT declares it)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            layer = module._modules.get(self.child)
            if isinstance(layer, HookedLayer):
                layer.unhook()
                del module._modules[self.child]
        unload: Any = super()._unload_and_optionally_merge
        return unload(False, progressbar)


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the hidden states among a module's arguments: its first, by position or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def check_module(model: nn.Module, field: str, name: str) -> nn.Module:
    """Return the module that a config field names.

    Raises:
        ValueError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"`{field}` is {name!r}, and {type(model).__name__} has no module of that name"
        ) from None


def block_list(module: nn.Module) -> nn.ModuleList | nn.Sequential:
    """Return a list of blocks as it is.

    Raises:
        TypeError: it is not one.
    """
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
        raise TypeError(f"blocks must be in a torch.nn.ModuleList, got {type(module).__name__}")
    return module

"""Where tuner layers go: around modules, around attentions, around modules whose parameters count.

PEFT places layers around modules. Packed attention weights, parameters by name, and modules inside
modules whose parameters are adapted are what it leaves to a method; here they are, once.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
    onload_layer,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from torch import nn

from graftune.adapters.base.layer_types import projection_names
from graftune.adapters.base.modules import is_target_parameter, without_base_layers
from graftune.adapters.base.tuner import GraftTuner


class WeightTuner(GraftTuner):
    """Base class of tuners that change weights, of whatever module or parameter.

    A method defines, beside what `GraftTuner` asks for, `parameter_layer_cls`, `adapt_module` and
    `adapt_parameters`.
    """

    # The layer around modules some of whose parameters are adapted by themselves.
    parameter_layer_cls: type[BaseTunerLayer]
    _injected: tuple[str, bool, dict[str, torch.Tensor] | None] | None = None
    peft_config: dict[str, Any]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @abstractmethod
    def adapt_module(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
    ) -> None:
        """Put a layer around a module, or add the adapter to the one that is there."""

    @abstractmethod
    def adapt_parameters(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
        names: list[str],
    ) -> None:
        """Adapt some of a module's own parameters by themselves."""

    def comes_with_module(self, target: nn.Module, adapter_name: str, key: str, name: str) -> bool:
        """Say whether a parameter that `target_parameters` names is adapted with its module.

        Raises:
            ValueError: it is adapted in another way, and cannot be in both.
        """
        layer: Any = target
        return isinstance(target, self.parameter_layer_cls) and layer.adapts(name, adapter_name)

    # Attaching.

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach an adapter to modules, attentions and parameters."""
        self._injected = (adapter_name, low_cpu_mem_usage, state_dict)
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        self._injected = None

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # The last step of an injection, and the place for what PEFT's own loop leaves out: it
        # passes over whatever is inside a layer, and modules inside a module whose parameters are
        # adapted are inside one.
        if self._injected is not None:
            self._inject_inner(model, *self._injected)
        super()._mark_only_adapters_as_trainable(model)

    def _inject_inner(
        self,
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, torch.Tensor] | None,
    ) -> None:
        config = self.peft_config[adapter_name]
        named = {key.rpartition(f".{self.prefix}")[0] for key in state_dict or ()}
        for path, outer in list(model.named_modules()):
            if not isinstance(outer, self.parameter_layer_cls):
                continue
            layer: Any = outer
            base = layer.base_layer
            for name, module in list(base.named_modules(prefix=f"{path}.base_layer")):
                key, (parent_path, _, child_name) = without_base_layers(name), name.rpartition(".")
                if module is base or child_name == "base_layer":
                    continue
                is_target = (
                    key in named
                    if state_dict is not None
                    else self._check_target_module_exists(config, key)
                )
                if is_target and adapter_name not in _adapters_of(module):
                    parent = model.get_submodule(parent_path)
                    with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                        self._create_and_replace(
                            config, adapter_name, module, child_name, parent, key
                        )
                    self.targeted_module_names.append(key)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            defaults = self.target_module_mapping.get(model_config.get("model_type", ""))
            if defaults is not None:
                peft_config.target_modules = (
                    defaults if isinstance(defaults, str) else set(defaults)
                )
            elif not peft_config.target_parameters:
                raise ValueError(
                    "Please specify `target_modules` or `target_parameters` in `peft_config`: "
                    "there are no default targets for this model"
                )
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, self.parameter_layer_cls):
            parent = parent.base_layer  # type: ignore[assignment]
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is not None:
            names = [parameter_name]
        elif isinstance(base, nn.MultiheadAttention):
            self._create_and_replace(
                peft_config,
                adapter_name,
                base.out_proj,
                "out_proj",
                base,
                f"{current_key}.out_proj",
            )
            names = projection_names(base)
        else:
            self.adapt_module(peft_config, adapter_name, target, target_name, parent, current_key)
            return
        self.adapt_parameters(
            peft_config, adapter_name, target, target_name, parent, current_key, names
        )

    def _activate(self, layer: BaseTunerLayer, config: Any) -> None:
        # A layer that comes with a further adapter follows the model's active ones.
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Layers place their tensors themselves; there is nothing else to carry over.
        setattr(parent, child_name, new_module)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt what `target_parameters` names; return the names found."""
        found = []
        adapters = _get_tuner_state_dict_key_prefixes(model)
        for path, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer) or _is_key_under_prefixes(path, adapters):
                continue
            key = without_base_layers(path)
            for name, _ in list(module.named_parameters(recurse=False)):
                if not is_target_parameter(peft_config, f"{key}.{name}"):
                    continue
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    self._inject_parameter(peft_config, adapter_name, model, path, key, name)
                found.append(f"{key}.{name}")
        return found

    def _inject_parameter(
        self,
        config: Any,
        adapter_name: str,
        model: nn.Module,
        path: str,
        key: str,
        name: str,
    ) -> None:
        if not path:
            raise ValueError(
                f"the parameter {name!r} belongs to the model itself and cannot be targeted: only "
                "parameters of modules inside the model can"
            )
        # The outermost layer around the module stands for it in its parent.
        while path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
        target = model.get_submodule(path)
        parent_path, _, target_name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if not self.comes_with_module(target, adapter_name, key, name):
            self._create_and_replace(config, adapter_name, target, target_name, parent, key, name)

    # Merging.

    def unmerge_adapter(self) -> None:
        """Restore the base weights bit for bit."""
        # Backwards: two layers that share a tied weight each put back what they found.
        for module in reversed(list(self.model.modules())):
            if isinstance(module, BaseTunerLayer):
                with onload_layer(module):
                    module.unmerge()

    # Saving: one name for a tensor, whatever other layers stand around its layer.

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, dot, tail = key.rpartition(f".{cls.prefix}")
        key = f"{without_base_layers(head)}{dot}{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _adapters_of(module: nn.Module) -> set[str]:
    return module._get_available_adapters() if isinstance(module, BaseTunerLayer) else set()

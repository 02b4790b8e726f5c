"""The ground that graftune's tuners share: check first, then attach; record and check the base."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from graftune.adapters.base.checkpoint import check_fits, check_not_empty
from graftune.adapters.base.config import GraftConfig
from graftune.adapters.base.digest import base_digest, difference
from graftune.adapters.base.messages import listing, nearest, warn_once
from graftune.adapters.base.modules import (
    base_modules,
    is_target_parameter,
    without_base_layers,
    without_index,
)

# The config fields that decide what is adapted.
_TARGET_FIELDS = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


class BaseModelMismatchError(ValueError):
    """An adapter is loaded onto another base model than it was trained on."""


class GraftTuner(BaseTuner):
    """Base class of graftune's tuners.

    A method defines `prefix`, `tuner_layer_cls`, `target_module_mapping`, `_create_and_replace`
    and `adapter_shapes`. In return every target is checked before the model is changed, the base
    model's digest is recorded and compared, and no empty or half-matching adapter is written or
    loaded.
    """

    @classmethod
    @abstractmethod
    def adapter_shapes(
        cls, config: PeftConfig, key: str, module: nn.Module, parameter: str | None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that the adapter would add to one target.

        Args:
            config: the adapter's config.
            key: the module's name in the base model.
            module: the base module, without any tuner layers around it.
            parameter: name of the parameter within the module, or None for the module itself.

        Raises:
            TypeError: the layer's type is not supported.
            ValueError: the config does not suit the layer.
        """

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Check every target, attach the adapter as PEFT does, and record the base's digest."""
        config = self.peft_config[adapter_name]
        if state_dict is None:
            try:
                self._check_targets(model, config)
            except Exception:
                # PEFT enters a config before it is used: without this a refused second adapter
                # would stay listed.
                if len(self.peft_config) > 1:
                    del self.peft_config[adapter_name]
                raise
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        if isinstance(config, GraftConfig):
            enter_base_digest(model, config, adapter_name, self.tuner_layer_cls)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT passes over `adapter_names` in silence where a method does not know them.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"`adapter_names` is not supported by {type(self).__name__}: its adapters act on a "
                "whole batch. Run one batch for each adapter"
            )
        yield

    # Checks before anything is changed.

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        if config.target_modules == DUMMY_TARGET_MODULES:
            return
        config = _maybe_include_all_linear_layers(config, model)
        found = False
        for key, module in base_modules(model):
            if self._check_target_module_exists(config, key):
                self.adapter_shapes(config, key, module, None)
                found = True
            for name, _ in module.named_parameters(recurse=False):
                if is_target_parameter(config, f"{key}.{name}"):
                    self.adapter_shapes(config, key, module, name)
                    found = True
        if not found:
            raise NoMatchingPeftModuleError(self._no_match_message(model, config))

    def _no_match_message(self, model: nn.Module, config: Any) -> str:
        results = [self._check_target_module_exists(config, key) for key, _ in base_modules(model)]
        candidates: dict[str, None] = {}
        for key, module in base_modules(model):
            try:
                self.adapter_shapes(config, key, module, None)
            except (TypeError, ValueError):
                continue
            candidates[without_index(key)] = None
        given = {
            name: getattr(config, name) for name in _TARGET_FIELDS if getattr(config, name, None)
        }
        wanted = config.target_modules
        first = wanted if isinstance(wanted, str) else next(iter(sorted(wanted or ())), "")
        parts = [key.split(".") for key in candidates]
        endings = {".".join(names[i:]) for names in parts for i in range(len(names))}
        hint = "" if first in endings else nearest(first, sorted(endings))
        return (
            f"{_peft_sentence(config, results)} Given: {given}.{hint} Modules that can be adapted: "
            f"{listing(candidates)}."
        )

    # Saving and loading.

    @classmethod
    def comparable_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, tuple[int, ...]]:
        """Return names and shapes in which a file of an adapter and the adapter have to agree.

        A method whose files may hold another form of its tensors says what is left to compare.
        """
        return shapes

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if getattr(config, "target_modules", None) != DUMMY_TARGET_MODULES:
            check_not_empty(tensors, adapter_name)
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        expected = {
            key: tuple(tensor.shape)
            for key, tensor in adapter_tensors(model, adapter_name, cls.prefix).items()
        }
        given = {key: tuple(t.shape) for key, t in remapped.items() if f".{cls.prefix}" in key}
        check_fits(expected, given)
        return remapped


def adapter_tensors(model: nn.Module, adapter_name: str, prefix: str) -> dict[str, torch.Tensor]:
    """Return the model's tensors of one adapter by their full names.

    These are `[...].<prefix>[name].<adapter>[...]`.
    """
    return {
        key: tensor
        for key, tensor in model.state_dict().items()
        # What follows may be called as adapters are: the parameter that a vector belongs to.
        if f".{prefix}" in key and key.rpartition(f".{prefix}")[2].split(".")[1:2] == [adapter_name]
    }


def enter_base_digest(
    model: nn.Module,
    config: GraftConfig,
    adapter_name: str,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Record the digest of an attached adapter's base tensors, or compare it to the recorded one.

    Raises:
        BaseModelMismatchError: they are of another base model, and the config's `base_check` is
            "error"; with "warn" it is a warning.
    """
    found = digest_of_targets(model, adapter_name, layer_cls)
    if found is None:
        return
    recorded = config.base_digest
    if recorded is None or config.base_digest_is_fresh or config.base_check == "off":
        config.base_digest = found
        config.base_digest_is_fresh = True
        return
    reason = difference(recorded, found)
    if reason is not None:
        message = _base_mismatch_message(config, model, reason)
        if config.base_check == "error":
            raise BaseModelMismatchError(message)
        warnings.warn(message, stacklevel=2)


def digest_of_targets(
    model: nn.Module, adapter_name: str, layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> str | None:
    """Return the digest of the base tensors that an attached adapter sits on.

    None, with one warning, when they cannot be compared: quantised, sharded or without values.

    Args:
        model: the model with the adapter.
        adapter_name: its name.
        layer_cls: the class of its layers, where other methods are on the model, too.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, layer in model.named_modules():
        if not isinstance(layer, layer_cls):
            continue
        if adapter_name not in layer._get_available_adapters():
            continue
        for name, tensor in _adapted_tensors(layer).items():
            module_name = without_base_layers(key.removeprefix("base_model.model."))
            tensors[f"{module_name}.{name}"] = tensor
    for name, tensor in tensors.items():
        reason = _not_comparable(tensor)
        if reason is not None:
            warn_once(
                f"base digest: {reason}",
                f"the base model's weights are {reason} (for example {name!r}): the adapter is "
                "not checked against the base model it was trained on",
            )
            return None
    return base_digest(tensors) if tensors else None


def _base_mismatch_message(config: GraftConfig, model: nn.Module, reason: str) -> str:
    trained_on = config.base_model_name_or_path or "a model without a name"
    here = getattr(model, "name_or_path", None) or type(model).__name__
    return (
        f"the adapter was trained on another base model than this one: it belongs to "
        f"{trained_on!r}, this is {here!r}, and {reason}. Load the base model it was trained on; "
        "or, to move it to a sibling checkpoint on purpose, call "
        "graftune.load(..., check_base='warn') or 'off'."
    )


def _adapted_tensors(layer: BaseTunerLayer) -> dict[str, torch.Tensor]:
    """The base tensors under a tuner layer, as they are without any adapter."""
    adapted = getattr(layer, "adapted_tensors", None)
    if adapted is not None:
        return adapted()
    base = layer.get_base_layer()
    if hasattr(base, "weight"):
        return {"weight": layer.weight}
    return dict(base.named_parameters(recurse=False))  # such as packed attention weights


def _not_comparable(tensor: torch.Tensor) -> str | None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return "quantised"
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return "not in memory"
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"of type {type(tensor).__name__}"
    return None


def _peft_sentence(config: Any, results: list[Any]) -> str:
    """PEFT's own words for the case, which its users search for."""
    excluded = any(isinstance(result, _ExcludedModule) for result in results)
    unmatched = not all(isinstance(result, _ExcludedModule) for result in results)
    if excluded and not unmatched:
        return "All modules were excluded."
    if not excluded and not config.target_modules:
        return (
            "No `target_modules` passed but also no `target_parameters` found. Please check the "
            "values for these arguments."
        )
    if not excluded:
        return f"Target modules {config.target_modules} not found in the base model."
    return (
        "No modules were targeted for adaptation. This might be caused by a combination of "
        "mismatched target modules and excluded modules."
    )

"""Mask tuning as a PEFT tuner: which layer gets which masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from graftune.adapters.base.checkpoint import is_training_checkpoint
from graftune.adapters.base.messages import listing, warn_once
from graftune.adapters.base.modules import without_base_layers
from graftune.adapters.base.weight_tuner import WeightTuner
from graftune.adapters.mask_tuning.layer import MaskTuningLayer
from graftune.adapters.mask_tuning.state import comparable, decoded, encoded
from graftune.adapters.mask_tuning.targets import shapes_at


class MaskTuningModel(WeightTuner):
    """A model with binary masks on its weights: W' = W ⊙ 1[m > τ] (arXiv 2307.15049).

    Args:
        model: the base model.
        config: a `MaskTuningConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, to be loaded next.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
        >>> model = get_peft_model(base, MaskTuningConfig(target_modules=["0"]))
    """

    prefix = "mask_tuning_"
    tuner_layer_cls = MaskTuningLayer
    parameter_layer_cls = MaskTuningLayer
    peft_config: dict[str, Any]  # of `MaskTuningConfig`s

    @classmethod
    def adapter_shapes(
        cls, config: Any, key: str, module: nn.Module, parameter: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the scores that one target would get.

        Raises:
            TypeError: the module's type is not supported.
            ValueError: the weight cannot be masked, or is claimed by two targets.
        """
        return shapes_at(config, key, module, parameter)

    # Attaching.

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach an adapter; say once which of its weights other modules use as well."""
        # Whose scores a weight has, by the weight: one that is tied is masked once.
        self._masked: dict[int, tuple[MaskTuningLayer, str]] = {}
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        self._warn_of_tied(model)
        del self._masked

    def _warn_of_tied(self, model: nn.Module) -> None:
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in self._masked:
                names.setdefault(id(parameter), []).append(without_base_layers(name))
        tied = [" = ".join(sorted(shared)) for shared in names.values() if len(shared) > 1]
        if tied:
            warn_once(
                f"tied: {tied}",
                f"weights that are shared are masked once, by one set of scores: {listing(tied)}. "
                "Where a module that shares one is no target it goes on with the whole weight, "
                "until the mask is merged",
            )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        unresolved = peft_config.target_modules is None and not peft_config.target_parameters
        if peft_config.targets is not None and unresolved:
            raise ValueError(
                f"targets={peft_config.targets!r} is looked up in the model by "
                "graftune.wrap(model, 'mask_tuning', targets=...); for PEFT's own functions name "
                "modules with `target_modules`"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def adapt_module(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
    ) -> None:
        """Mask the weight of a module."""
        self.adapt_parameters(
            config, adapter_name, target, target_name, parent, key, names=["weight"]
        )

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
        """Mask some of a module's own parameters."""
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        others = {name: self._masked.get(id(getattr(base, name))) for name in names}
        shared = {
            name: other
            for name, other in others.items()
            if other is not None and other != (target, name)
        }
        if isinstance(target, MaskTuningLayer):
            layer = target
            layer.update_layer(adapter_name, config, names, shared)
        else:
            layer = MaskTuningLayer(target, adapter_name, config, names, shared)
            self._replace_module(parent, target_name, layer, target)
            self._activate(layer, config)
        for name in names:
            self._masked.setdefault(id(getattr(base, name)), (layer, name))

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: masks do not add up.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "masks do not add up, so there is no weighted sum of them: activate several with "
            "`model.base_model.set_adapter([...])`, which keeps a weight where all of them do"
        )

    def _check_merge_allowed(self) -> None:
        # All layers before the first one is merged.
        super()._check_merge_allowed()
        for layer in self.model.modules():
            if isinstance(layer, MaskTuningLayer):
                layer.check_mergeable(layer.active_adapters)

    # Saving and loading.

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
        return encoded(model, config, adapter_name, tensors, as_scores=is_training_checkpoint())

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        def name_in_file(key: str) -> str:
            return cls._remove_adapter_name_from_key(key, adapter_name)

        tensors = decoded(model, config, adapter_name, state_dict, name_in_file)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)

    @classmethod
    def comparable_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the masks' names, whatever form they have."""
        return comparable(shapes)

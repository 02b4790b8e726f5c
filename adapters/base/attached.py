"""The PEFT model of a base model whose adapters were attached by somebody else."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from graftune.adapters.base.messages import listing
from graftune.adapters.stack import StackConfig


def attached(model: nn.Module) -> PeftModel:
    """Return the PEFT model of a base model that has adapters in it already.

    diffusers and transformers put adapters into a model by `model.add_adapter(config)`, without a
    `peft.PeftModel` around it. This makes one: to save the adapter as a PEFT folder, to publish,
    merge or unload it, to add another. Nothing is copied, and the model itself is not changed.

    Args:
        model: with adapters of one method; a `PeftModel` is returned as it is.

    Raises:
        ValueError: there are no adapters, or adapters of several methods.

    Example:
        ```python
        pipeline.unet.add_adapter(graftune.SaraConfig(fraction=0.1))
        graftune.attached(pipeline.unet).save_pretrained("my-sara")
        ```
    """
    if isinstance(model, PeftModel):
        return model
    configs: dict[str, Any] = dict(getattr(model, "peft_config", None) or {})
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not configs or not layers:
        raise ValueError(
            f"the {type(model).__name__} has no adapters; attach one with graftune.wrap, "
            "graftune.load or `model.add_adapter(config)`"
        )
    methods = sorted({config.peft_type.value for config in configs.values()})
    if len(methods) > 1 or any(isinstance(config, StackConfig) for config in configs.values()):
        raise ValueError(
            f"the {type(model).__name__} has adapters of several methods ({listing(methods)}), "
            "which no PEFT model holds together: keep the one that graftune.wrap or "
            "graftune.load has returned, or delete adapters until one method is left"
        )
    active = [name for name in layers[0].active_adapters if name in configs] or list(configs)[:1]
    config = configs[active[0]]
    # What PEFT's constructors attach goes into a module of no concern.
    peft_model = PeftModel(nn.Sequential(nn.Linear(1, 1)), LoraConfig(target_modules=["0"]))
    peft_model.base_model = _tuner(model, config, active)
    peft_model.peft_type, peft_model.active_adapter = config.peft_type, active[0]
    peft_model._adapters_disabled = layers[0].disable_adapters
    peft_model.training = peft_model.base_model.training = model.training
    return peft_model


def _tuner(model: nn.Module, config: Any, active: list[str]) -> BaseTuner:
    """Return the tuner of adapters that are there, made without injecting anything."""
    tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    idle = type(tuner_cls.__name__, (tuner_cls,), {"inject_adapter": lambda *_, **__: None})
    with warnings.catch_warnings():
        # PEFT warns that adapters are there, which is the point.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        tuner = idle(model, {}, active[0])
    tuner.__class__ = tuner_cls
    tuner.active_adapter = active[0] if len(active) == 1 else active
    return tuner

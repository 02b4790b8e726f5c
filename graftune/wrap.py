"""The one call: attach an adapter to a pretrained model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from graftune.adapters.deep_prompts import DeepPromptConfig
from graftune.adapters.mask_tuning import MaskTuningConfig
from graftune.adapters.messages import listing, nearest
from graftune.adapters.regularizers import Regularizer, record
from graftune.adapters.restore import untouched_on_error
from graftune.adapters.sara import SaraConfig
from graftune.integrations.families import default_targets, recognise
from graftune.integrations.masks import fill_mask_config
from graftune.integrations.prompts import fill_prompt_config
from graftune.recipes import recipes

# Fields that PEFT or graftune fill themselves.
_NOT_FOR_USERS = frozenset(
    {
        "peft_type",
        "peft_version",
        "auto_mapping",
        "base_digest",
        "base_dtype",
        "cutoff",
        "regularizers",
    }
)


def wrap(
    model: nn.Module,
    method: str | PeftConfig,
    *,
    adapter_name: str = "default",
    regularizers: Sequence[Regularizer | Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    **overrides: Any,
) -> PeftModel:
    """Attach an adapter to a pretrained model and return it as a PEFT model, ready to train.

    The model's family is recognised (transformers, open_clip, timm, diffusers, or any
    `nn.Module`), and what the config leaves open is filled in for it: the layers to adapt
    (`graftune.integrations.families.default_targets`) and the task type of a transformers head.
    `peft.get_peft_model(model, config)` does the same without these defaults.

    Args:
        model: the base model. Its weights are frozen and never changed. A `PeftModel` gets a
            second adapter of the same method, which is added without being activated.
        method: a recipe's name (`graftune.recipes()`) or any PEFT config, `LoraConfig` included;
            the config is copied.
        adapter_name: the name under which PEFT knows the adapter.
        regularizers: what keeps the adapter honest, recorded in its config and used by
            `graftune.Trainer`: objects such as `graftune.FrozenDistillation()`, or dicts with their
            name and settings. None takes the recipe's or the config's own; an empty list none.
        tokenizer: the model's tokenizer or processor, for methods that start from words; None
            finds it by the model's name.
        **overrides: fields of the config.

    Returns:
        The `peft.PeftModel`: `save_pretrained`, `push_to_hub`, `disable_adapter`,
        `merge_and_unload`, `unload`, several adapters and so on work as PEFT's users know them.

    Raises:
        ValueError: unknown method, config field or adapter name in use; nothing that can be
            adapted; a config that does not suit the model. The model is then as it was.
        TypeError: `method` is neither a name nor a config, or a targeted layer is not supported.

    Example:
        >>> import graftune, torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        >>> model = graftune.wrap(layers, "flora", r=2)
        >>> model.print_trainable_parameters()
        trainable params: 104 || all params: 384 || trainable%: 27.0833
    """
    config = _config(method, overrides)
    if regularizers is None and isinstance(method, str):
        regularizers = recipes()[method].regularizers
    if regularizers is not None:
        config = record(config, regularizers)
    if isinstance(model, PeftModel):
        return _add(model, config, adapter_name, tokenizer)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a model to wrap must be a torch.nn.Module, got {type(model).__name__}. Of a "
            "diffusers pipeline wrap the part to adapt, for example `pipeline.unet`."
        )
    _fill(config, model, tokenizer)
    with untouched_on_error(model):
        return get_peft_model(model, config, adapter_name=adapter_name)


def _add(model: PeftModel, config: PeftConfig, adapter_name: str, tokenizer: Any) -> PeftModel:
    if adapter_name in model.peft_config:
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}; it has "
            f"{listing(model.peft_config)}. Choose another `adapter_name`."
        )
    present = next(iter(model.peft_config.values())).peft_type
    if present != config.peft_type:
        raise ValueError(
            f"the model already has an adapter of the method {_value(present)}; PEFT holds one "
            f"method a model, so {_value(config.peft_type)} cannot be added. Merge the first with "
            "`model.merge_and_unload()` or start from the base model."
        )
    _fill(config, model.get_base_model(), tokenizer)
    with untouched_on_error(model):
        model.add_adapter(adapter_name, config)
    return model


def _config(method: str | PeftConfig, overrides: dict[str, Any]) -> PeftConfig:
    """Return a new config from a recipe's name or a config, with `overrides` checked and set."""
    if isinstance(method, str):
        known = recipes()
        if method not in known:
            raise ValueError(
                f"unknown method {method!r}.{nearest(method, known)} Known: {listing(known)}; any "
                "PEFT config object, such as peft.LoraConfig(), is accepted as well."
            )
        config_cls: type[PeftConfig] = known[method].config_cls
        values = {**known[method].defaults, **overrides}
    elif isinstance(method, PeftConfig):
        config_cls = type(method)
        given = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
        values = copy.deepcopy(given) | overrides
    else:
        raise TypeError(
            f"a method is a recipe's name or a PEFT config, got {type(method).__name__}. Known "
            f"names: {listing(recipes())}."
        )
    allowed = {f.name for f in dataclasses.fields(config_cls) if f.init} - _NOT_FOR_USERS
    for name in overrides:
        if name not in allowed:
            raise ValueError(
                f"{config_cls.__name__} has no field {name!r}.{nearest(name, allowed)} Fields: "
                f"{listing(sorted(allowed), most=40)}."
            )
    # A config that was attached elsewhere carries that base's digest: this is a new attachment.
    values.pop("base_digest", None)
    return config_cls(**values)


def _fill(config: Any, model: nn.Module, tokenizer: Any) -> None:
    """Fill in what the config leaves open for this model."""
    family = recognise(model)
    if config.task_type is None and family.task_type is not None:
        config.task_type = family.task_type
    if isinstance(config, DeepPromptConfig):
        fill_prompt_config(config, model, tokenizer)
        return
    if isinstance(config, MaskTuningConfig):
        fill_mask_config(config, model)
        return
    if getattr(config, "target_modules", "absent") is not None or isinstance(config, SaraConfig):
        return  # SaRA's own default is every module
    if getattr(config, "target_parameters", None):
        return
    targets = default_targets(model)
    if not targets:
        raise ValueError(
            f"the {family.library} model {family.architecture} has no linear, convolution or "
            "attention layers to adapt by default. Name modules with `target_modules` or tensors "
            "with `target_parameters`."
        )
    config.target_modules = set(targets)


def _value(peft_type: Any) -> str:
    return str(getattr(peft_type, "value", peft_type))

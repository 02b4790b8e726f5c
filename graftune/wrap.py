"""The one call: attach an adapter to a pretrained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from graftune.adapters.base.messages import listing
from graftune.adapters.base.restore import untouched_on_error
from graftune.adapters.regularizers import Regularizer, record
from graftune.adapters.stack import StackConfig, add_method
from graftune.adapters.stack.config import method_of
from graftune.integrations.libraries.pipelines import is_pipeline, target_of, tell_diffusers
from graftune.methods import Method, fill, method_configs, own_regularizers


def wrap(
    model: Any,
    method: Method | Sequence[Method],
    *,
    component: str | None = None,
    adapter_name: str = "default",
    regularizers: Sequence[Regularizer | Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    **overrides: Any,
) -> PeftModel:
    """Attach an adapter to a pretrained model and return it as a PEFT model, ready to train.

    The model's family is recognised (transformers, open_clip, timm, diffusers, or any
    `nn.Module`), and what the config leaves open is filled in for it: the layers to adapt
    (`graftune.integrations.libraries.families.default_targets`) and the task type of a
    transformers head.
    `peft.get_peft_model(model, config)` does the same without these defaults.

    Args:
        model: the base model. Its weights are frozen and never changed. A `PeftModel` gets a
            second adapter of the same method, which is added without being activated; or another
            method on top of the one it has, which becomes part of its adapter. What of that was
            frozen, as adapters are that were loaded without `is_trainable`, stays frozen. Of a
            pipeline of diffusers one model gets the adapter, active and inside, so that the
            pipeline uses it from now on.
        method: a recipe's name (`graftune.recipes()`) or any PEFT config, `LoraConfig` included;
            the config is copied. A list stacks several methods, which are trained jointly and
            saved as one adapter (`graftune.adapters.stack.StackConfig`).
        component: of a pipeline, the name of the model to adapt; None: its only unet or
            transformer.
        adapter_name: the name under which PEFT knows the adapter.
        regularizers: what keeps the adapter honest, recorded in its config and used by
            `graftune.Trainer`: objects such as `graftune.FrozenDistillation()`, or dicts with their
            name and settings. None takes the recipes' or the configs' own; an empty list none.
        tokenizer: the model's tokenizer or processor, for methods that start from words; None
            finds it by the model's name.
        **overrides: fields of the config; of several methods, fields that only one has.

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
    methods = [method] if isinstance(method, (str, PeftConfig)) else method
    if not isinstance(methods, Sequence):
        raise TypeError(
            f"a method is a recipe's name or a PEFT config, or a list of them; got "
            f"{type(method).__name__}"
        )
    configs = method_configs(methods, overrides)
    if regularizers is None:
        regularizers = own_regularizers(methods)
    target = target_of(model, component)
    if not isinstance(target, nn.Module):
        raise TypeError(
            "a model to wrap must be a torch.nn.Module or a pipeline of diffusers, got "
            f"{type(model).__name__}"
        )
    if isinstance(target, PeftModel):
        wrapped = _add(target, configs, regularizers, adapter_name, tokenizer)
    else:
        config = _filled(configs, target, regularizers, tokenizer)
        with untouched_on_error(target):
            wrapped = get_peft_model(target, config, adapter_name=adapter_name)
    if is_pipeline(model):
        _enter(model, wrapped, adapter_name)
    tell_diffusers(wrapped)
    return wrapped


def _enter(pipeline: Any, wrapped: PeftModel, adapter_name: str) -> None:
    """Activate a pipeline's new adapter, and record whose it is."""
    if adapter_name in wrapped.peft_config:
        wrapped.set_adapter(adapter_name)
    # PEFT asks the model for it, which has no name of its own in a pipeline. Of a folder there is
    # nothing to record: PEFT would look for a config.json in it whenever it saves.
    name = str(getattr(pipeline, "name_or_path", None) or "") or None
    name = None if name and Path(name).is_dir() else name
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = config.base_model_name_or_path or name


def _filled(
    configs: list[PeftConfig], model: nn.Module, regularizers: Any, tokenizer: Any
) -> PeftConfig:
    """Return one config, of one method or several, filled in for a model."""
    for config in configs:
        fill(config, model, tokenizer)
    config = configs[0]
    if len(configs) > 1:
        config = StackConfig(parts=configs, task_type=config.task_type, revision=config.revision)
    return config if regularizers is None else record(config, regularizers)


def _add(
    model: PeftModel,
    configs: list[PeftConfig],
    regularizers: Any,
    adapter_name: str,
    tokenizer: Any,
) -> PeftModel:
    """Add one more adapter of the methods that are there, or other methods to the one there is."""
    base = model.get_base_model()
    present = next(iter(model.peft_config.values()))
    methods = present.methods if isinstance(present, StackConfig) else [method_of(present)]
    if [method_of(config) for config in configs] == methods:
        if adapter_name in model.peft_config:
            raise ValueError(
                f"the model already has an adapter {adapter_name!r}; it has "
                f"{listing(model.peft_config)}. Choose another `adapter_name`."
            )
        config = _filled(configs, base, regularizers, tokenizer)
        with untouched_on_error(model):
            model.add_adapter(adapter_name, config)
        return model
    if adapter_name not in ("default", *model.peft_config) and len(model.peft_config) == 1:
        raise ValueError(
            f"another method joins the adapter that is there, {listing(model.peft_config)}: leave "
            f"out adapter_name={adapter_name!r}"
        )
    for config in configs:
        fill(config, base, tokenizer)
    add_method(model, configs, regularizers or ())
    return model

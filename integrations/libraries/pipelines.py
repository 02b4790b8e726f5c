"""Pipelines of diffusers: which of their models an adapter is for, and that diffusers knows of it.

PEFT attaches adapters inside the model, which stays the object that it is: a pipeline goes on using
its own `unet` or `transformer`, and moving, offloading, saving and `isinstance` see no difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from graftune.adapters.base.attached import attached
from graftune.adapters.base.messages import listing, nearest
from graftune.integrations.libraries.families import recognise

_PIPELINES = ("DiffusionPipeline", "ModularPipeline")
_DENOISERS = ("unet", "transformer")


def is_pipeline(candidate: Any) -> bool:
    """Say whether something is a pipeline of diffusers; diffusers is not imported for it."""
    return any(
        cls.__name__ in _PIPELINES and cls.__module__.partition(".")[0] == "diffusers"
        for cls in type(candidate).__mro__
    )


def target_of(base: Any, component: str | None, config: PeftConfig | None = None) -> Any:
    """Return what an adapter is for: a model as it is, of a pipeline one of its models.

    Args:
        base: a model, or a pipeline of diffusers.
        component: the model's name in the pipeline; None: the one of the class that the adapter
            was trained on where a config says so, else the pipeline's only unet or transformer.
        config: of a saved adapter, or None.

    Returns:
        The model; of a pipeline out of `torch.compile`'s wrapper, and as a `PeftModel` where it
        has adapters already.

    Raises:
        ValueError: no such component, none that the adapter can be for, or several; its weights
            are offloaded one by one; it has adapters of several methods; or a component of
            something that is no pipeline.
    """
    if is_pipeline(base):
        return _component(base, component, config)
    if component is not None:
        raise ValueError(
            f"component={component!r} is for a pipeline of diffusers, got {type(base).__name__}"
        )
    return base


def _component(pipeline: Any, component: str | None, config: PeftConfig | None) -> nn.Module:
    models = _models(pipeline)
    trained_on = ((config and config.auto_mapping) or {}).get("base_model_class")
    name = component or _only(pipeline, models, trained_on)
    if name not in models:
        raise ValueError(
            f"{type(pipeline).__name__} has no model {name!r}.{nearest(name, models)} "
            f"Its models: {_described(models)}."
        )
    model = models[name]
    fitting = [other for other in models if _class_name(models[other]) == trained_on]
    if fitting and name not in fitting:
        raise ValueError(
            f"the adapter was trained on a {trained_on}, and {name!r} is a {_class_name(model)}: "
            f"it is for component={fitting[0]!r}"
        )
    _check_in_memory(name, model)
    return attached(model) if getattr(model, "peft_config", None) else model


def pipeline_part(class_name: str) -> str | None:
    """Return what a model of diffusers is called in a pipeline, by the name of its class.

    Example:
        >>> pipeline_part("SD3Transformer2DModel")
        'transformer'
    """
    if "UNet" in class_name:
        return "unet"
    return "transformer" if "Transformer" in class_name else None


def tell_diffusers(model: PeftModel) -> None:
    """Let a model of diffusers know of its adapters, however they were attached.

    Its `set_adapter`, `disable_adapters`, `delete_adapters` and so on go by a mark that only its
    own `add_adapter` sets. The folder that it was loaded from becomes a string: PEFT writes a
    `Path` into model cards as a Python object, which nothing reads.
    """
    base: Any = model.get_base_model()
    if recognise(base).library != "diffusers":
        return
    if hasattr(type(base), "_hf_peft_config_loaded"):
        base._hf_peft_config_loaded = _HasAdapters(base)
    folder = getattr(base.config, "_name_or_path", None)
    if isinstance(folder, Path):
        base.register_to_config(_name_or_path=str(folder))


class _HasAdapters:
    """True as long as a model has adapters: PEFT, which unloads them, knows nothing of the mark."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __bool__(self) -> bool:
        return bool(getattr(self._model, "peft_config", None))


def _models(pipeline: Any) -> dict[str, nn.Module]:
    return {
        name: getattr(part, "_orig_mod", part)
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }


def _only(pipeline: Any, models: dict[str, nn.Module], trained_on: str | None) -> str:
    """Return the name of the only model that an adapter can be for."""
    if trained_on is None:
        found = [name for name in models if name in _DENOISERS]
        what = "unet or transformer"
    else:
        found = [name for name in models if _class_name(models[name]) == trained_on]
        what = f"{trained_on}, which the adapter was trained on"
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"{type(pipeline).__name__} has no {what}. Its models: {_described(models)}. Give the "
            "pipeline of the adapter's base model, or say which model with `component`"
        )
    raise ValueError(
        f"{type(pipeline).__name__} has several models that are a {what}: say which with "
        f"`component`, {' or '.join(map(repr, found))}"
    )


def _class_name(model: nn.Module) -> str:
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def _described(models: dict[str, nn.Module]) -> str:
    return ", ".join(f"{name!r} ({_class_name(model)})" for name, model in models.items()) or "none"


def _check_in_memory(name: str, model: nn.Module) -> None:
    missing = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(
            f"weights of {name!r} are not in memory ({listing(missing, 2)}), as after "
            "`pipeline.enable_sequential_cpu_offload()`: call `pipeline.remove_all_hooks()`, "
            "attach the adapter, and then `pipeline.enable_model_cpu_offload()` or "
            "`enable_group_offload(...)`, which adapters work with"
        )

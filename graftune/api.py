"""What users call: attach an adapter, load one, or take hold of one that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from graftune.adapters.base.attached import attached as attached_to
from graftune.adapters.base.checkpoint import check_fits
from graftune.adapters.base.classifier import fit_classifier
from graftune.adapters.base.config import GraftConfig
from graftune.adapters.base.folder import read_config, read_shapes
from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.base.restore import untouched_on_error
from graftune.adapters.regularizers import Regularizer, record
from graftune.adapters.stack import StackConfig, add_method
from graftune.adapters.stack.config import method_of
from graftune.integrations.libraries.pipelines import is_pipeline, target_of, tell_diffusers
from graftune.integrations.sharing.class_lists import check_classes
from graftune.integrations.sharing.fetch import fetch_adapter
from graftune.methods import Method, fill, method_configs, own_regularizers

_HUB_OPTIONS = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download"})
_PEFT_OPTIONS = frozenset({"torch_device", "low_cpu_mem_usage", "autocast_adapter_dtype"})


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
        model: the base model. Its weights are frozen; a method may train values inside them
            (SaRA), and `unload` returns them bit for bit as they were. A `PeftModel` gets a second
            adapter of the same method, which is added without being activated; or another method
            on top of the one it has, which becomes part of its adapter. Adapters that are frozen,
            such as those loaded without `is_trainable`, stay frozen. In a pipeline of diffusers
            one model gets the adapter, active, and the pipeline uses it from now on.
        method: a recipe's name (`graftune.recipes()`) or any PEFT config, `LoraConfig` included;
            the config is copied. A list stacks several methods, which are trained jointly and
            saved as one adapter (`graftune.adapters.stack.StackConfig`).
        component: of a pipeline, the name of the model to adapt; None: its only unet or
            transformer.
        adapter_name: the name under which PEFT knows the adapter.
        regularizers: the loss terms and hooks of training, recorded in the config and used by
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


def load(
    base: Any,
    adapter: str | Path,
    *,
    component: str | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    check_base: Literal["error", "warn", "off"] = "error",
    subfolder: str | None = None,
    **options: Any,
) -> PeftModel:
    """Load a saved adapter onto its base model.

    Args:
        base: the base model; a `PeftModel` that gets one more adapter of the same method; or a
            pipeline of diffusers, whose model gets the adapter inside, so that the pipeline uses
            it from now on, beside adapters of the same method that are there.
        adapter: a folder, or a repository id on the Hub, with `adapter_config.json` and
            `adapter_model.safetensors`. Of this library or of PEFT.
        component: of a pipeline, the name of the model that the adapter is for, such as
            "transformer" or "text_encoder"; None finds it by the class that it was trained on.
        adapter_name: the name under which PEFT knows the adapter.
        is_trainable: whether the adapter goes on training; else it is frozen.
        check_base: what to do when the recorded digest says that the adapter was trained on
            another base model: refuse, warn, or nothing.
        subfolder: folder within `adapter`.
        **options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` for the
            Hub; `torch_device`, `low_cpu_mem_usage`, `autocast_adapter_dtype` for PEFT.

    Returns:
        The `peft.PeftModel` with the adapter active (a `PeftModel` given as base keeps its active
        adapter, as with PEFT's `load_adapter`). Of a pipeline the one around its model, which
        switches the adapter off, merges it or takes it out, while the pipeline keeps the model.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a pickle file, a truncated, corrupt or empty file, an unknown method, a
            classifier of other classes than the base model's (`ClassListError`), an
            adapter that does not fit (`AdapterMismatchError`) or that belongs to another base
            (`BaseModelMismatchError`); a pipeline without the model that it is for. The base
            model is then as it was.

    Example:
        ```python
        import graftune
        from transformers import CLIPModel

        base = CLIPModel.from_pretrained("openai/clip-vit-base-patch16")
        model = graftune.load(base, "user/clip-emoji-flora")

        graftune.load(pipeline, "user/emoji-sara")  # pipeline(...) draws with it
        ```
    """
    _check_options(options, check_base)
    hub = {name: value for name, value in options.items() if name in _HUB_OPTIONS}
    folder = fetch_adapter(str(adapter), subfolder, **hub)
    config = read_config(folder)
    shapes = read_shapes(folder / SAFETENSORS_WEIGHTS_NAME)
    config.inference_mode = not is_trainable
    if isinstance(config, GraftConfig):
        config.base_check = check_base
    peft_options = {name: value for name, value in options.items() if name in _PEFT_OPTIONS}
    target = target_of(base, component, config)

    with untouched_on_error(target):
        if isinstance(target, PeftModel):
            _check_can_add(target, config, adapter_name)
            target.add_adapter(adapter_name, config)
            target.load_adapter(
                str(folder), adapter_name, is_trainable=is_trainable, **peft_options
            )
            model = target
        else:
            check_classes(target, folder)
            fit_classifier(target, getattr(config, "modules_to_save", None) or (), shapes)
            model = PeftModel.from_pretrained(
                target,
                str(folder),
                adapter_name=adapter_name,
                is_trainable=is_trainable,
                config=config,
                **peft_options,
            )
        _check_tensors(model, adapter_name, shapes)
    if is_pipeline(base):
        model.set_adapter(adapter_name, inference_mode=not is_trainable)
    tell_diffusers(model)
    return model


def attached(model: Any, *, component: str | None = None) -> PeftModel:
    """Return the PEFT model of a model, or of a pipeline's model, that has adapters already.

    What `graftune.wrap` and `graftune.load` return, once more; and for adapters that were put in
    by `model.add_adapter(config)` of diffusers or transformers, which makes no `peft.PeftModel`.
    With it they are saved as a PEFT folder, published, merged, unloaded, exported. Nothing is
    copied or changed.

    Args:
        model: with adapters of one method; or a pipeline of diffusers.
        component: of a pipeline, the model's name; None: its only unet or transformer.

    Raises:
        ValueError: there are no adapters, or adapters of several methods; no such component.

    Example:
        ```python
        pipeline.unet.add_adapter(graftune.SaraConfig(fraction=0.1))
        graftune.attached(pipeline).save_pretrained("my-sara")
        ```
    """
    found = attached_to(target_of(model, component))
    tell_diffusers(found)
    return found


def _check_name_is_free(model: PeftModel, adapter_name: str) -> None:
    if adapter_name in model.peft_config:
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}; it has "
            f"{listing(model.peft_config)}. Choose another `adapter_name`."
        )


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
        _check_name_is_free(model, adapter_name)
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


def _check_options(options: dict[str, Any], check_base: str) -> None:
    if check_base not in ("error", "warn", "off"):
        raise ValueError(f"check_base is 'error', 'warn' or 'off', got {check_base!r}")
    allowed = sorted(_HUB_OPTIONS | _PEFT_OPTIONS)
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"graftune.load has no option {name!r}.{nearest(name, allowed)} Options: "
                f"{listing(allowed)}."
            )


def _check_can_add(model: PeftModel, config: PeftConfig, adapter_name: str) -> None:
    _check_name_is_free(model, adapter_name)
    if config.peft_type != model.peft_type:
        given, present = (getattr(m, "value", m) for m in (config.peft_type, model.peft_type))
        raise ValueError(
            f"the adapter's method is {given}, and the model has {listing(model.peft_config)} of "
            f"the method {present}: one model takes loaded adapters of one method. Unload or "
            "delete those first"
        )


def _check_tensors(model: PeftModel, adapter_name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that the file had exactly the adapter's tensors (for methods of PEFT as for ours)."""
    expected = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    # PEFT also writes base embeddings into an adapter when they were resized or targeted.
    base = model.state_dict().keys() - expected.keys()
    given = {name: shape for name, shape in shapes.items() if name not in base}
    found = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    tuner: Any = model.base_model
    if hasattr(type(tuner), "comparable_shapes"):
        found, given = (dict(tuner.comparable_shapes(each)) for each in (found, given))
    check_fits(found, given)

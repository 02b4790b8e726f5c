"""The inverse of wrapping and saving: an adapter from a folder or the Hub onto its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from graftune.adapters.base.checkpoint import check_fits
from graftune.adapters.base.classifier import fit_classifier
from graftune.adapters.base.config import GraftConfig
from graftune.adapters.base.folder import read_config, read_shapes
from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.base.restore import untouched_on_error
from graftune.integrations.libraries.pipelines import is_pipeline, target_of, tell_diffusers
from graftune.integrations.sharing.class_lists import check_classes
from graftune.integrations.sharing.fetch import fetch_adapter

_HUB_OPTIONS = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download"})
_PEFT_OPTIONS = frozenset({"torch_device", "low_cpu_mem_usage", "autocast_adapter_dtype"})


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
    if adapter_name in model.peft_config:
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}; it has "
            f"{listing(model.peft_config)}. Choose another `adapter_name`."
        )
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

"""The inverse of wrapping and saving: an adapter from a folder or the Hub onto its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from graftune.adapters.checkpoint import check_fits
from graftune.adapters.config import GraftConfig
from graftune.adapters.messages import listing, nearest
from graftune.adapters.restore import untouched_on_error

_HUB_OPTIONS = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download"})
_PEFT_OPTIONS = frozenset({"torch_device", "low_cpu_mem_usage", "autocast_adapter_dtype"})


def load(
    base: nn.Module,
    adapter: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    check_base: Literal["error", "warn", "off"] = "error",
    subfolder: str | None = None,
    **options: Any,
) -> PeftModel:
    """Load a saved adapter onto its base model.

    Args:
        base: the base model, or a `PeftModel` that gets one more adapter of the same method.
        adapter: a folder, or a repository id on the Hub, with `adapter_config.json` and
            `adapter_model.safetensors`. Of this library or of PEFT.
        adapter_name: the name under which PEFT knows the adapter.
        is_trainable: whether the adapter goes on training; else it is frozen.
        check_base: what to do when the recorded digest says that the adapter was trained on
            another base model: refuse, warn, or nothing.
        subfolder: folder within `adapter`.
        **options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` for the
            Hub; `torch_device`, `low_cpu_mem_usage`, `autocast_adapter_dtype` for PEFT.

    Returns:
        The `peft.PeftModel` with the adapter active (a `PeftModel` given as base keeps its active
        adapter, as with PEFT's `load_adapter`).

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a pickle file, a truncated, corrupt or empty file, an unknown method, an
            adapter that does not fit (`AdapterMismatchError`) or that belongs to another base
            (`BaseModelMismatchError`). The base model is then as it was.

    Example:
        ```python
        import graftune
        from transformers import CLIPModel

        base = CLIPModel.from_pretrained("openai/clip-vit-base-patch16")
        model = graftune.load(base, "user/clip-emoji-flora")
        ```
    """
    _check_options(options, check_base)
    hub = {name: value for name, value in options.items() if name in _HUB_OPTIONS}
    folder = _fetch(str(adapter), subfolder, hub)
    config = _read_config(folder)
    shapes = _read_shapes(folder / SAFETENSORS_WEIGHTS_NAME)
    config.inference_mode = not is_trainable
    if isinstance(config, GraftConfig):
        config.base_check = check_base
    peft_options = {name: value for name, value in options.items() if name in _PEFT_OPTIONS}

    with untouched_on_error(base):
        if isinstance(base, PeftModel):
            _check_can_add(base, config, adapter_name)
            base.add_adapter(adapter_name, config)
            base.load_adapter(str(folder), adapter_name, is_trainable=is_trainable, **peft_options)
            model = base
        else:
            model = PeftModel.from_pretrained(
                base,
                str(folder),
                adapter_name=adapter_name,
                is_trainable=is_trainable,
                config=config,
                **peft_options,
            )
        _check_tensors(model, adapter_name, shapes)
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


def _fetch(adapter: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    """Return the local folder with the adapter's config and tensors, downloading if need be."""
    if Path(adapter).is_dir():
        folder = Path(adapter, subfolder or "")
        if not (folder / CONFIG_NAME).is_file():
            inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
            hint = f" Adapters in its subfolders: {listing(inner)}; pass `subfolder=`." * bool(
                inner
            )
            raise FileNotFoundError(f"no {CONFIG_NAME} in {str(folder)!r}.{hint}")
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            _refuse_without_safetensors(str(folder), (folder / WEIGHTS_NAME).is_file())
        return folder
    try:
        config_file = hf_hub_download(adapter, CONFIG_NAME, subfolder=subfolder, **hub)
    except (HFValidationError, EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{adapter!r} is neither a folder with an adapter nor a repository with a "
            f"{CONFIG_NAME} on the Hub (or in its cache, when offline)"
        ) from error
    try:
        hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)
    except EntryNotFoundError as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        has_pickle = not offline and _on_hub(adapter, WEIGHTS_NAME, subfolder, hub)
        _refuse_without_safetensors(adapter, has_pickle)
    return Path(config_file).parent


def _on_hub(adapter: str, name: str, subfolder: str | None, hub: dict[str, Any]) -> bool:
    path = f"{subfolder}/{name}" if subfolder else name
    options = {key: hub[key] for key in ("revision", "token") if key in hub}
    return file_exists(adapter, path, **options)


def _refuse_without_safetensors(place: str, has_pickle: bool) -> None:
    if has_pickle:
        raise ValueError(
            f"{place!r} holds a pickle ({WEIGHTS_NAME}), which can run code when it is read: "
            "graftune reads safetensors only. If you trust its origin, load it with plain PEFT and "
            "save it again with `model.save_pretrained(folder)`."
        )
    raise FileNotFoundError(f"no {SAFETENSORS_WEIGHTS_NAME} in {place!r}")


def _read_config(folder: Path) -> PeftConfig:
    path = folder / CONFIG_NAME
    try:
        content = json.loads(path.read_text())
        method = content["peft_type"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not an adapter's config: {error}") from error
    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = sorted(str(key.value) for key in PEFT_TYPE_TO_CONFIG_MAPPING)
        raise ValueError(
            f"unknown method {method!r} in {str(path)!r}.{nearest(str(method), known)} Update peft "
            "and graftune, or import the package that registers it."
        )
    return PEFT_TYPE_TO_CONFIG_MAPPING[method].from_pretrained(str(folder))


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the header of a safetensors file and check that its numbers are there and finite."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is truncated or corrupt ({error}). Download or copy it again."
        ) from error
    if not any(tensor.numel() for tensor in tensors.values()):
        raise ValueError(
            f"{str(path)!r} is an empty adapter: it holds no numbers. It was probably saved from "
            "sharded parameters that had not been gathered; save it again from the training run."
        )
    broken = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise ValueError(
            f"{len(broken)} tensors of {str(path)!r} hold NaN or infinity ({listing(broken, 3)}): "
            "the file is corrupt or the training diverged. Use an earlier checkpoint."
        )
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_can_add(model: PeftModel, config: PeftConfig, adapter_name: str) -> None:
    if adapter_name in model.peft_config:
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}; it has "
            f"{listing(model.peft_config)}. Choose another `adapter_name`."
        )


def _check_tensors(model: PeftModel, adapter_name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that the file had exactly the adapter's tensors (for methods of PEFT as for ours)."""
    expected = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    # PEFT also writes base embeddings into an adapter when they were resized or targeted.
    base = model.state_dict().keys() - expected.keys()
    given = {name: shape for name, shape in shapes.items() if name not in base}
    check_fits({name: tuple(tensor.shape) for name, tensor in expected.items()}, given)

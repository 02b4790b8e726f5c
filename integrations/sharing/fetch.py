"""An adapter's files from a folder, or from the Hub into its client's cache."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from graftune.adapters.base.folder import check_files, refuse_without_safetensors

CARD_NAME = "README.md"
# What diffusers and kohya's scripts write: a LoRA of a whole pipeline, without a config.
_PIPELINE_LORA = "pytorch_lora_weights.safetensors"


def fetch_adapter(
    adapter: str, subfolder: str | None = None, *, card: bool = False, **hub: Any
) -> Path:
    """Return the local folder with an adapter's config and tensors, downloading if need be.

    Args:
        adapter: a folder, or a repository id on the Hub.
        subfolder: folder within `adapter`.
        card: also download the model card, where there is one.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        FileNotFoundError: no adapter there; with the client's own words, in one line.
        ValueError: the tensors are in a pickle; or it is a LoRA of diffusers' own form.

    Example:
        >>> folder = fetch_adapter("user/clip-emoji-flora", revision="v1")
    """
    if Path(adapter).is_dir():
        folder = Path(adapter, subfolder or "")
        if (folder / _PIPELINE_LORA).is_file() and not (folder / CONFIG_NAME).is_file():
            raise _is_pipeline_lora(str(folder))
        check_files(folder)
        return folder
    config_file = _download_config(adapter, subfolder, hub)
    try:
        hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)
    except EntryNotFoundError as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        has_pickle = not offline and _on_hub(adapter, WEIGHTS_NAME, subfolder, hub)
        refuse_without_safetensors(adapter, has_pickle)
    if card:
        with suppress(EntryNotFoundError):
            hf_hub_download(adapter, CARD_NAME, subfolder=subfolder, **hub)
    return Path(config_file).parent


def _is_pipeline_lora(place: str) -> ValueError:
    return ValueError(
        f"{place!r} holds a LoRA of diffusers ({_PIPELINE_LORA}), which is no adapter of PEFT: "
        "load it with `pipeline.load_lora_weights(...)`, of the pipeline that it was trained for"
    )


def one_line(error: Exception) -> str:
    """Return an error's message without its line breaks."""
    return " ".join(str(error).split())


def _download_config(adapter: str, subfolder: str | None, hub: dict[str, Any]) -> str:
    try:
        return hf_hub_download(adapter, CONFIG_NAME, subfolder=subfolder, **hub)
    except (
        HFValidationError,
        EntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    ) as error:
        is_there = isinstance(error, RemoteEntryNotFoundError)  # the repository, not the file
        if is_there and _on_hub(adapter, _PIPELINE_LORA, subfolder, hub):
            raise _is_pipeline_lora(adapter) from error
        raise FileNotFoundError(
            f"{adapter!r} is neither a folder with an adapter nor a repository with a "
            f"{CONFIG_NAME} on the Hub (or in its cache, when offline): {one_line(error)}"
        ) from error


def _on_hub(adapter: str, name: str, subfolder: str | None, hub: dict[str, Any]) -> bool:
    path = f"{subfolder}/{name}" if subfolder else name
    options = {key: hub[key] for key in ("revision", "token") if key in hub}
    return file_exists(adapter, path, **options)

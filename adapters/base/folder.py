"""A saved adapter's folder: its config and its tensors, checked before anything is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.regularizers.recording import FIELD, note


def check_files(folder: Path) -> None:
    """Check that a local folder holds an adapter's two files, and no pickle in their place.

    Raises:
        FileNotFoundError: a file is missing; names adapters in subfolders.
        ValueError: the tensors are in a pickle.
    """
    if not (folder / CONFIG_NAME).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" Adapters in its subfolders: {listing(inner)}; pass `subfolder=`." * bool(inner)
        raise FileNotFoundError(f"no {CONFIG_NAME} in {str(folder)!r}.{hint}")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        refuse_without_safetensors(str(folder), (folder / WEIGHTS_NAME).is_file())


def refuse_without_safetensors(place: str, has_pickle: bool) -> None:
    """Raise for a place without safetensors: ValueError when it holds a pickle instead."""
    if has_pickle:
        raise ValueError(
            f"{place!r} holds a pickle ({WEIGHTS_NAME}), which can run code when it is read: "
            "graftune reads safetensors only. If you trust its origin, load it with plain PEFT and "
            "save it again with `model.save_pretrained(folder)`."
        )
    raise FileNotFoundError(f"no {SAFETENSORS_WEIGHTS_NAME} in {place!r}")


def read_config(folder: Path) -> PeftConfig:
    """Read an adapter's config as an object of its method's config class.

    Raises:
        ValueError: the file is no adapter's config, or of a method that is not registered.
    """
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
    values = content.pop(FIELD, None)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method].from_peft_type(**content)
    return note(config, values) if values else config


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file as `safetensors.safe_open` does.

    Raises:
        ValueError: the file is truncated or corrupt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is truncated or corrupt ({error}). Download or copy it again."
        ) from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a file's tensors and check that their numbers are there and finite.

    Raises:
        ValueError: the file is truncated, corrupt or empty, or holds NaN or infinity.
    """
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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

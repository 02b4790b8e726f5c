"""The state of regularizers in a training checkpoint: tensors and JSON in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

_TENSOR = "tensor"


def save_state(state: Mapping[str, Any], file: Path) -> None:
    """Write a nested state of tensors and of what JSON can say.

    Raises:
        TypeError: something in it is neither, or a name is not a string.
    """
    file.write_bytes(_to_bytes(state))


def load_state(file: Path) -> dict[str, Any]:
    """Read back what `save_state` wrote."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return _with_tensors(json.loads(opened.metadata()["state"]), tensors)


def state_digest(state: Mapping[str, Any]) -> str:
    """Return a digest by which processes tell whether their states are the same."""
    return hashlib.sha256(_to_bytes(state)).hexdigest()


def _to_bytes(state: Mapping[str, Any]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    content = json.dumps(_without_tensors(state, "", tensors))
    return save(tensors, metadata={"state": content})


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move tensors out of a nested state, leaving the names they go by in the file."""
    if torch.is_tensor(value):
        name = f"{len(tensors)}{path}"
        # A clone: the file format refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {
            _name(key): _without_tensors(v, f"{path}/{key}", tensors) for key, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the state of a regularizer goes by strings, got the name {key!r}")
    return key


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(v, tensors) for key, v in value.items()}
    return value

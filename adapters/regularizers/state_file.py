"""The state of regularizers in a training checkpoint: tensors and JSON in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_TENSOR = "tensor"


def save_state(state: Mapping[str, Any], file: Path) -> None:
    """Write a nested dict of tensors and of what JSON can say."""
    tensors: dict[str, torch.Tensor] = {}
    content = _without_tensors(state, "", tensors)
    save_file(tensors, file, metadata={"state": json.dumps(content)})


def load_state(file: Path) -> dict[str, Any]:
    """Read back what `save_state` wrote."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return _with_tensors(json.loads(opened.metadata()["state"]), tensors)


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move tensors out of a nested dict, leaving the names they go by in the file."""
    if torch.is_tensor(value):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        # A clone: the file format refuses tensors that share memory.
        tensors[path] = whole.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {key: _without_tensors(v, f"{path}/{key}", tensors) for key, v in value.items()}
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(v, tensors) for key, v in value.items()}
    return value

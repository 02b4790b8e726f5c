"""Calling a module with other tensors in the place of its own parameters, for one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module with other tensors in the place of some of its parameters.

    Args:
        module: the module to call.
        tensors: by the parameters' names within the module, dotted where they are further inside.
        args, kwargs: what it is called with.

    Example:
        >>> call_with(nn.Linear(2, 1, bias=False), {"weight": torch.ones(1, 2)}, (x,), {})
    """
    owners = {name: _owner(module, name) for name in tensors}
    # FSDP lays gathered weights over the parameters, where `functional_call` does not reach.
    laid_over = {
        name: (owner, owner.__dict__[own_name])
        for name, (owner, own_name) in owners.items()
        if own_name in owner.__dict__
    }
    plain = all(own_name in owner._parameters for owner, own_name in owners.values())
    # Laying them over costs next to nothing; a graph that is traced knows `functional_call`.
    if not laid_over and (torch.compiler.is_compiling() or not plain):
        return functional_call(module, tensors, args, kwargs)
    for name, tensor in tensors.items():
        owner, own_name = owners[name]
        owner.__dict__[own_name] = tensor
    try:
        return module(*args, **kwargs)
    finally:
        for owner, own_name in owners.values():
            del owner.__dict__[own_name]
        for name, (owner, value) in laid_over.items():
            owner.__dict__[owners[name][1]] = value


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own_name = name.rpartition(".")
    return (module.get_submodule(path) if path else module), own_name

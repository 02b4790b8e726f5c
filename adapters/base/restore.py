"""Undoing a failed attachment: the model's structure is put back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# The dictionaries in which a module keeps what an adapter may replace, add or hook into.
_REGISTRIES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


@contextmanager
def untouched_on_error(model: nn.Module) -> Iterator[None]:
    """Give back the model as it was when the block raises.

    Only references are kept, no values: attaching an adapter replaces modules and freezes
    parameters, it never changes a base weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> try:
        ...     with untouched_on_error(model):
        ...         model[0] = nn.Identity()
        ...         raise ValueError
        ... except ValueError:
        ...     model[0]
        Linear(in_features=2, out_features=2, bias=True)
    """
    registries = [
        (registry, dict(registry))
        for module in model.modules()
        for registry in (getattr(module, name) for name in _REGISTRIES)
    ]
    classes = [(module, type(module)) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = _peft_configs(model)
    labels = _labels(model)
    active = [
        (module, module._active_adapter)
        for module in model.modules()
        if hasattr(module, "_active_adapter")
    ]
    try:
        yield
    except BaseException:
        for registry, content in registries:
            registry.clear()
            registry.update(content)
        for module, cls in classes:
            if type(module) is not cls:  # one through which an adapter's parameters are read
                module.__class__ = cls
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        for module, name in active:
            module._active_adapter = name
        _restore_peft_configs(model, configs)
        for field, names in labels.items():
            setattr(model.config, field, names)
        raise


def _labels(model: Any) -> dict[str, Any]:
    """The names of a classifier's outputs in a config of transformers."""
    config = getattr(model, "config", None)
    return {
        name: getattr(config, name) for name in ("id2label", "label2id") if hasattr(config, name)
    }


def _peft_configs(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The modules that own a `peft_config`, with a copy of its entries."""
    return [
        (module, dict(module.__dict__["peft_config"]))
        for module in model.modules()
        if "peft_config" in module.__dict__
    ]


def _restore_peft_configs(
    model: nn.Module, configs: list[tuple[nn.Module, dict[str, Any]]]
) -> None:
    owners = {id(module) for module, _ in configs}
    for module in model.modules():
        if "peft_config" in module.__dict__ and id(module) not in owners:
            del module.peft_config
    for module, content in configs:
        present = module.__dict__["peft_config"]
        present.clear()
        present.update(content)

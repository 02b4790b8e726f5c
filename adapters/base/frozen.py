"""The frozen model, and the model as it was: the same model with other adapters, never a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def frozen_base(model: nn.Module) -> Iterator[None]:
    """Let a model compute what its base model computes: adapter off, evaluation mode, no gradients.

    Unlike PEFT's `disable_adapter` this leaves `requires_grad` alone, so that it can stand inside a
    training step: under DistributedDataParallel, with parts of an adapter frozen on purpose, and in
    compiled models. Evaluation mode keeps the base model's dropout out of what it is compared with,
    and its random numbers out of the run's.

    Args:
        model: a model with adapters of any PEFT method, as it comes from DDP, FSDP or
            torch.compile.

    Example:
        >>> with frozen_base(model):
        ...     frozen_logits = model(**batch).logits
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    switched = [
        module
        for module in modules
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        and not module._disable_adapters
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for module in modules:
            if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
                stack.enter_context(module.disable_adapter())
        stack.callback(_set, switched, training)
        for module in switched:
            module._disable_adapters = True
        for module in training:
            module.training = False
        yield


@contextmanager
def as_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Let a model compute what it does with another adapter: evaluation mode, no gradients.

    Unlike PEFT's `set_adapter` this leaves `requires_grad` alone, so that it can stand inside a
    training step.

    Args:
        model: a model with an adapter of that name, of any PEFT method that is not prompt learning.
        adapter_name: its name.

    Raises:
        ValueError: no layer of the model has it.

    Example:
        >>> with as_adapter(model, "previous"):
        ...     previous_logits = model(**batch).logits
    """
    modules = list(model.modules())
    layers = [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not any(_has_adapter(layer, adapter_name) for layer in layers):
        raise ValueError(f"no layer of the {type(model).__name__} has an adapter {adapter_name!r}")
    active = [(layer, layer._active_adapter) for layer in layers]
    training = [module for module in modules if module.training]
    with torch.no_grad():
        try:
            for layer in layers:
                layer._active_adapter = [adapter_name]
            for module in training:
                module.training = False
            yield
        finally:
            for layer, names in active:
                layer._active_adapter = names
            _set([], training)


def _has_adapter(layer: Any, adapter_name: str) -> bool:
    if isinstance(layer, BaseTunerLayer):
        return adapter_name in layer._get_available_adapters()
    return adapter_name in getattr(layer, "modules_to_save", ())


def _set(switched: Sequence[Any], training: Sequence[nn.Module]) -> None:
    for module in switched:
        module._disable_adapters = False
    for module in training:
        module.training = True

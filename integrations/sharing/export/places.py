"""Where an adapter sits: the base model as it is under PEFT's layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.base.modules import stands_beside
from graftune.adapters.sara import SaraRoot


def without_wrappers(module: nn.Module) -> nn.Module:
    """Return the base module under a tuner layer, or under a wrapper of `modules_to_save`."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return module


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the base model's modules: the name in the bare model, what stands there, the base.

    Example:
        >>> [name for name, _, _ in walk(nn.Sequential(nn.Linear(2, 2)))]
        ['', '0']
    """
    base = without_wrappers(module)
    yield name, module, base
    for child_name, child in base.named_children():
        if not stands_beside(child):
            yield from walk(child, f"{name}.{child_name}" if name else child_name)


def join(module: str, parameter: str) -> str:
    """Return the full name of a module's parameter.

    Example:
        >>> join("", "weight"), join("fc", "weight")
        ('weight', 'fc.weight')
    """
    return f"{module}.{parameter}" if module else parameter


def has_adapter(module: nn.Module, adapter: str) -> bool:
    """Say whether the module is a tuner layer that carries the adapter."""
    return isinstance(module, BaseTunerLayer) and adapter in module._get_available_adapters()


def trained_in_full(model: PeftModel, adapter: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the modules of `modules_to_save`: the name, the base module and the trained copy."""
    for name, outer, base in walk(model.get_base_model()):
        if isinstance(outer, ModulesToSaveWrapper) and adapter in outer.modules_to_save:
            yield name, base, outer.modules_to_save[adapter]


def base_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the base model's parameters by the names of the bare model; shared ones repeatedly."""
    return {
        join(name, parameter): tensor
        for name, _, base in walk(model.get_base_model())
        for parameter, tensor in base._parameters.items()
        if tensor is not None
    }


def check_exportable(model: PeftModel, adapter: str) -> None:
    """Raise unless the adapter changes weights of this model and nothing is merged.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: no such adapter; it is merged, consists of prompts or trained tokens, has
            numbers that are not finite or not in memory, or other methods' layers are on the
            model, too.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"what is exported is a peft.PeftModel, as graftune.wrap and graftune.load return it; "
            f"got {type(model).__name__}"
        )
    if adapter not in model.peft_config:
        raise ValueError(
            f"the model has no adapter {adapter!r}.{nearest(adapter, model.peft_config)} It has "
            f"{listing(model.peft_config)}"
        )
    if not isinstance(model.base_model, BaseTuner) or any(
        stands_beside(layer) and not isinstance(layer, SaraRoot) for layer in model.modules()
    ):
        raise ValueError(
            f"the adapter {adapter!r} ({method_name(model, adapter)}) consists of prompts, not of "
            "changes of weights: it has no form without its method"
        )
    _check_layers(model, adapter)
    _check_numbers(model, adapter)


def _check_layers(model: PeftModel, adapter: str) -> None:
    ours: Any = model.base_model.tuner_layer_cls
    layers = [(name, outer) for name, outer, _ in walk(model.get_base_model())]
    tokens = [
        name
        for name, outer in layers
        if isinstance(outer, AuxiliaryTrainingWrapper)
        and not isinstance(outer, ModulesToSaveWrapper)
    ]
    if tokens:
        raise ValueError(
            f"trained tokens (`trainable_token_indices`) on {listing(tokens, 3)} cannot be "
            "exported: merge them with `model.merge_and_unload()` and save the model"
        )
    foreign = [
        name
        for name, outer in layers
        for inner in _layers_around(outer)
        if not isinstance(inner, ours)
    ]
    if foreign:
        raise ValueError(
            f"several methods' layers are on one model (another one's on {listing(foreign, 3)}), "
            "and an export holds one adapter: merge the other method's adapter into the base "
            "model first, with its own `merge_and_unload()`"
        )
    merged = [
        name
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, BaseTunerLayer) and layer.merged
    ]
    if merged:
        raise ValueError(
            f"adapters are merged into the base weights (for example of {merged[0]!r}): call "
            "`model.unmerge_adapter()` before exporting"
        )


def _check_numbers(model: PeftModel, adapter: str) -> None:
    for name, tensor in _adapter_tensors(model, adapter).items():
        reason = _why_absent(tensor)
        if reason is not None:
            raise ValueError(
                f"the adapter's tensor {name!r} is {reason}: gather the model in one process "
                "before exporting, or load the saved adapter with graftune.load"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"the adapter's tensor {name!r} holds NaN or infinity: the training diverged. Use "
                "an earlier checkpoint"
            )


def _adapter_tensors(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _layers_around(module: Any) -> Iterator[BaseTunerLayer]:
    while isinstance(module, BaseTunerLayer):
        yield module
        module = getattr(module, "base_layer", None)  # one beside the weights is around nothing


def check_readable(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raise ValueError unless base weights are there as plain floating-point numbers."""
    for name, tensor in tensors:
        reason = _why_unreadable(tensor)
        if reason is not None:
            raise ValueError(
                f"{what} needs the base weights themselves, and {name!r} is {reason}: load the "
                "base model in float32, float16 or bfloat16 on one device and the adapter onto it"
            )


def _why_absent(tensor: torch.Tensor) -> str | None:
    if tensor.device.type == "meta" or hasattr(tensor, "ds_id"):
        return "not in memory"
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"of type {type(tensor).__name__}"
    return None


def _why_unreadable(tensor: torch.Tensor) -> str | None:
    reason = _why_absent(tensor)
    if reason is not None:
        return reason
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"quantised ({str(tensor.dtype).removeprefix('torch.')})"
    return None


def check_no_trained_bias(model: PeftModel, adapter: str, what: str) -> None:
    """Raise ValueError when the adapter has trained biases of the base model in their place."""
    bias = getattr(model.peft_config[adapter], "bias", "none")
    if bias != "none":
        raise ValueError(
            f"the adapter's config says bias={bias!r}: it has changed biases of the base model in "
            f"their place, and {what} has no place for them. Export the merged model instead"
        )


def method_name(model: PeftModel, adapter: str) -> str:
    """Return the name of the adapter's method, such as "FLORA"."""
    peft_type = model.peft_config[adapter].peft_type
    return str(getattr(peft_type, "value", peft_type))


def stored_dtype(model: PeftModel, adapter: str) -> torch.dtype:
    """Return the dtype for what an export stores: float32, or float64 if the adapter has it."""
    tensors = _adapter_tensors(model, adapter).values()
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32

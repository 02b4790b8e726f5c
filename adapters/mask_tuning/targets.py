"""What mask tuning can mask: which modules and parameters, checked before anything is touched."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftune.adapters.base.layer_types import (
    CONVOLUTIONS,
    TRANSPOSED,
    parameter_shape,
    projection_names,
)
from graftune.adapters.mask_tuning.config import MaskTuningConfig
from graftune.adapters.mask_tuning.layer import scored_entries

SUPPORTED = (nn.Linear, Conv1D, *CONVOLUTIONS, *TRANSPOSED)


def shapes_at(
    config: MaskTuningConfig, key: str, module: nn.Module, parameter: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's scores for one target, by their names in the model.

    Args:
        config: the adapter's config.
        key: the module's name.
        module: the base module.
        parameter: the name of its parameter that is masked by itself, or None for the module.

    Raises:
        TypeError: the module's type is not supported.
        ValueError: the weight cannot be masked, or is claimed by two targets.
    """
    if parameter is not None:
        _check_claimed_once(config, key, module, parameter)
        return _shape(config, key, module, parameter)
    if isinstance(module, nn.MultiheadAttention):
        shapes: dict[str, tuple[int, ...]] = {}
        for name in projection_names(module):
            shapes |= _shape(config, key, module, name)
        out_proj: nn.Module = module.out_proj
        if isinstance(out_proj, BaseTunerLayer):  # another adapter is there already
            out_proj = out_proj.get_base_layer()
        inner = _shape(config, f"{key}.out_proj", out_proj, "weight")
        return shapes | {f"out_proj.{name}": shape for name, shape in inner.items()}
    if not isinstance(module, SUPPORTED) and _quantised(module) is None:
        names = ", ".join(f"`{cls.__module__.split('.')[0]}.{cls.__name__}`" for cls in SUPPORTED)
        raise TypeError(
            f"cannot mask {key!r}: modules of type {type(module).__name__} are not supported. "
            f"Supported are {names}, `torch.nn.MultiheadAttention`, and parameters by name, of "
            f"whatever module, through `target_parameters`, for example [{key + '.weight'!r}]"
        )
    return _shape(config, key, module, "weight")


def _shape(
    config: MaskTuningConfig, key: str, module: nn.Module, parameter: str
) -> dict[str, tuple[int, ...]]:
    name = f"{key}.{parameter}"
    reason = _quantised(module)
    if reason is None and parameter not in module._parameters:
        reason = "computed by a parametrization of its own"
    if reason is None:
        tensor = getattr(module, parameter)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            reason = f"of type {tensor.dtype}"
    if reason is not None:
        raise ValueError(
            f"cannot mask the weight {name!r}: it is {reason}. Masks are trained on weights in "
            "float32, float16, bfloat16 or float64: load the base model in one of these, or leave "
            "the weight out with `exclude_modules`"
        )
    shape = parameter_shape(tensor)
    if 0 in shape:
        raise ValueError(f"cannot mask the weight {name!r}: it has the empty shape {shape}")
    scored = shape if config.fraction is None else (scored_entries(shape, config.fraction),)
    return {f"mask_tuning_scores.{parameter}": scored}


def _quantised(module: nn.Module) -> str | None:
    # torchao asks for the model's own quantiser at this point: that one is an nn.Linear anyway.
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=len)
    return None if backend is None else f"quantised by {backend.backend_name}"


def _check_claimed_once(
    config: MaskTuningConfig, key: str, module: nn.Module, parameter: str
) -> None:
    """Raise ValueError for a parameter whose module is a target, too."""
    by_module = {"weight"}
    if isinstance(module, nn.MultiheadAttention):
        by_module = set(projection_names(module))
    claimants = [key]
    if parameter == "weight" and key.endswith(".out_proj"):
        claimants.append(key.removesuffix(".out_proj"))  # of an attention, perhaps
    for claimant in claimants:
        is_target = config.target_modules is not None and check_target_module_exists(
            config, claimant
        )
        if is_target and parameter in by_module:
            raise ValueError(
                f"cannot mask the parameter {f'{key}.{parameter}'!r}: it is claimed by two "
                f"targets, as {claimant!r} is in `target_modules`, too. Name it in only one of "
                "`target_modules` and `target_parameters`"
            )

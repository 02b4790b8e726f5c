"""What a FLoRA config asks of one target: its ranks, its scale, and whether that is possible."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from graftune.adapters.base.layer_types import parameter_shape, projection_names, runs_as_defined
from graftune.adapters.flora.config import FloraConfig
from graftune.adapters.flora.functional import resolve_ranks
from graftune.adapters.flora.shapes import (
    tensor_shapes,
    weight_shape,
)


def shapes_at(
    config: FloraConfig, key: str, module: nn.Module, parameter: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors for one target, by their names in a checkpoint.

    Args:
        config: the adapter's config.
        key: the module's name.
        module: the base module.
        parameter: the name of its parameter that is adapted by itself, or None for the module.

    Raises:
        TypeError: the module's type is not supported.
        ValueError: the ranks do not suit the weight.
    """
    if parameter is not None:
        _check_parameter(config, key, module, parameter)
        return _parameter_shapes(config, key, module, parameter)
    if isinstance(module, nn.MultiheadAttention):
        shapes = {}
        for name in projection_names(module):
            shapes.update(_parameter_shapes(config, key, module, name))
        out_proj: nn.Module = module.out_proj
        if isinstance(out_proj, BaseTunerLayer):  # another adapter is there already
            out_proj = out_proj.get_base_layer()
        inner = shapes_at(config, f"{key}.out_proj", out_proj)
        return shapes | {f"out_proj.{name}": shape for name, shape in inner.items()}
    try:
        shape = weight_shape(module)
    except TypeError as error:
        raise TypeError(f"cannot adapt {key!r}: {error}") from None
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"cannot adapt {key!r}: with max_norm the embedding changes its own weights in every "
            "forward pass. Set `max_norm=None`, or leave the module out with `exclude_modules`"
        )
    return tensor_shapes(shape, _ranks(config, key, shape))


def rank_setting(config: FloraConfig, *keys: str) -> int | list[int]:
    for key in keys:
        pattern = get_pattern_key(list(config.rank_pattern), key)
        if pattern in config.rank_pattern:
            return config.rank_pattern[pattern]
    return config.r


def scale_setting(config: FloraConfig, *keys: str) -> float:
    for key in keys:
        pattern = get_pattern_key(list(config.scale_pattern), key)
        if pattern in config.scale_pattern:
            return config.scale_pattern[pattern]
    return config.scale


def _ranks(config: FloraConfig, key: str, shape: tuple[int, ...], *others: str) -> tuple[int, ...]:
    """Return the ranks for one weight, or say what is wrong with them and how to put it right."""
    r = rank_setting(config, key, *others)
    if min(shape, default=0) == 0:
        raise ValueError(f"cannot adapt {key!r}: its weight has the empty shape {shape}")
    try:
        return resolve_ranks(r, shape)
    except ValueError as error:
        raise ValueError(
            f"cannot adapt {key!r}: {error}. Its weight has the shape {shape}: give `r` as one "
            f"number, or ranks for {len(shape)} axes with `rank_pattern={{{key!r}: "
            f"{[min(8, size) for size in shape]}}}`"
        ) from None


def _parameter_shapes(
    config: FloraConfig, key: str, module: nn.Module, parameter: str
) -> dict[str, tuple[int, ...]]:
    shape = parameter_shape(getattr(module, parameter))
    return tensor_shapes(shape, _ranks(config, f"{key}.{parameter}", shape, key), parameter)


def _check_parameter(config: FloraConfig, key: str, module: nn.Module, parameter: str) -> None:
    """Raise ValueError for a parameter that cannot be adapted by itself."""
    name = f"{key}.{parameter}"
    tensor = getattr(module, parameter)
    if len(parameter_shape(tensor)) < 2 or not tensor.is_floating_point():
        raise ValueError(
            f"cannot adapt the parameter {name!r} of shape {parameter_shape(tensor)} and type "
            f"{tensor.dtype}: only floating-point tensors with at least two axes have a low-rank "
            "form. Leave it out of `target_parameters`"
        )
    both = config.target_modules is not None and check_target_module_exists(config, key)
    if both and not isinstance(module, nn.MultiheadAttention):
        raise ValueError(
            f"cannot adapt the parameter {name!r}: its module is in `target_modules`, too. Name it "
            "in only one of `target_modules` and `target_parameters`"
        )


def has_no_input(module: nn.Module) -> bool:
    """Say whether a module runs with W + ΔW, so that dropout has no input of a branch to act on."""
    # An attention reads the weight of its `out_proj` and never calls it.
    return not runs_as_defined(module) or isinstance(module, NonDynamicallyQuantizableLinear)

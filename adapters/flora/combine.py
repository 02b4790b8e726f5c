"""Several adapters as one: where they sit, and the config of their sum."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy

from torch import Tensor, nn

from graftune.adapters.flora.config import FloraConfig
from graftune.adapters.flora.functional import resolve_ranks
from graftune.adapters.flora.layer import FloraLayer
from graftune.adapters.flora.parameter import FloraParameters
from graftune.adapters.flora.weight import FloraWeight

# The name of an adapted tensor: its module's, and its own where it is adapted by itself.
Place = tuple[str, str | None]


def places(model: nn.Module, adapters: Sequence[str]) -> dict[Place, FloraLayer]:
    """Return the layers that carry any of the adapters, by the tensors they adapt."""
    found: dict[Place, FloraLayer] = {}
    for path, layer in model.named_modules():
        key = ".".join(part for part in path.split(".") if part != "base_layer")
        if isinstance(layer, FloraParameters):
            found |= {(key, name): layer for name in layer.adapted_names(adapters)}
        elif isinstance(layer, FloraWeight) and layer.adapted_names(adapters):
            found[key, None] = layer
    return found


def combined_config(
    configs: Sequence[FloraConfig], tensors: Mapping[Place, tuple[Tensor, list[Tensor]]]
) -> FloraConfig:
    """Return a config that gives an adapter just the given places and shapes.

    Args:
        configs: those of the adapters that are added up; what is not about places, ranks and
            scale is taken from the first.
        tensors: core and factors of the sum, by place.
    """
    config = deepcopy(configs[0])
    config.base_digest = None  # of other tensors than the sum's, perhaps
    config.scale, config.scale_pattern = 1.0, {}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.target_modules = sorted(key for key, name in tensors if name is None)
    config.target_parameters = [f"{key}.{name}" for key, name in tensors if name] or None
    ranks = [other.r for other in configs if isinstance(other.r, int)]
    if len(ranks) == len(configs):
        config.r = sum(ranks)  # right for most, and short
    config.rank_pattern = {}
    for (key, name), (core, factors) in tensors.items():
        shape = [factor.shape[0] for factor in factors]
        if not _gives(config.r, shape, core.shape):
            full = key if name is None else f"{key}.{name}"
            config.rank_pattern[f"^{re.escape(full)}"] = list(core.shape)
    return config


def _gives(r: int | list[int], shape: Sequence[int], ranks: Sequence[int]) -> bool:
    try:
        return resolve_ranks(r, shape) == tuple(ranks)
    except ValueError:
        return False

"""Which weights of a model mask tuning masks: what its `targets` mean in each family."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from graftune.adapters.base.layer_types import CONVOLUTIONS, TRANSPOSED
from graftune.adapters.base.messages import listing, nearest
from graftune.adapters.base.modules import base_modules
from graftune.adapters.mask_tuning import MaskTuningConfig
from graftune.integrations.libraries.families import (
    ATTENTION,
    LINEAR,
    block_number,
    recognise,
    shorten,
)

_CONVOLUTIONS = CONVOLUTIONS + TRANSPOSED
_LAYERS = LINEAR + ATTENTION + _CONVOLUTIONS
# The vision tower in a model of two: prompts and class names are the text tower's business.
_TOWERS = ("vision_model", "visual")
# Names under which the libraries have a block's attention, and an attention that pools.
_ATTENTION = re.compile(r"(^|\.)(\w*_)?attn\w*\.|(^|\.)\w*attention\w*\.|\bSelfAttention\.")
_POOL = re.compile(r"(^|\.)(attnpool|attn_pool)\.")

Layers = dict[str, nn.Module]


def fill_mask_config(config: MaskTuningConfig, model: nn.Module, tokenizer: Any = None) -> None:
    """Fill in which modules of a model a config of mask tuning is about.

    `targets` is a word, or names and patterns as `target_modules` takes them; None is "attention",
    what the paper has in its best variant.

    Args:
        config: changed in place.
        model: any model.
        tokenizer: not used; every filling function takes it.

    Raises:
        ValueError: an unknown word; nothing that the word means in this model; `target_modules`
            that say something else than `targets`.

    Example:
        >>> config = MaskTuningConfig(targets="all")
        >>> fill_mask_config(config, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        >>> config.target_modules
        {'0'}
    """
    named = config.target_modules is not None or bool(config.target_parameters)
    if named and config.targets is None:
        return
    targets = "attention" if config.targets is None else config.targets
    found = _resolve(targets, model)
    if named and config.target_modules not in (found, sorted(found)):
        raise ValueError(
            f"targets={targets!r} means other modules of this model than `target_modules`: give "
            "one of the two"
        )
    config.targets, config.target_modules = targets, found  # type: ignore[assignment]


def _resolve(targets: list[str] | str, model: nn.Module) -> set[str] | str:
    every = dict(base_modules(model))
    if not isinstance(targets, str):
        return set(targets)
    if targets in WORDS:
        layers = _in_scope(every)
        chosen = WORDS[targets](layers)
        if not chosen:
            raise ValueError(
                f"the {recognise(model).library} model {recognise(model).architecture} has no "
                f"layers that targets={targets!r} means. Name modules with `target_modules` or "
                "tensors with `target_parameters`."
            )
        return set(shorten(sorted(chosen), list(every)))
    if targets == "all-linear" or any(re.fullmatch(targets, key) for key in every):
        return targets
    if any(key == targets or key.endswith(f".{targets}") for key in every):
        return {targets}
    raise ValueError(
        f"unknown targets {targets!r}.{nearest(targets, WORDS)} It is one of {listing(WORDS)}, or "
        "names or a pattern of the model's modules, and there are none of that name."
    )


def _in_scope(every: Layers) -> Layers:
    """The layers of the vision tower, or of the whole model where there is no other tower."""
    towers = [name for name in _TOWERS if name in every]
    attentions = [key for key, module in every.items() if isinstance(module, ATTENTION)]
    return {
        key: module
        for key, module in every.items()
        if isinstance(module, _LAYERS)
        if not towers or key.startswith(f"{towers[0]}.")
        # The projections inside an nn.MultiheadAttention are masked with it.
        if not any(key.startswith(f"{attention}.") for attention in attentions)
    }


def _attention(layers: Layers) -> set[str]:
    """Patch embedding and attention projections; all convolutions where no block has attention."""
    in_blocks = {
        key
        for key, module in layers.items()
        if block_number(key) is not None and _is_attention(key, module)
    }
    if in_blocks:
        return in_blocks | {key for key, module in layers.items() if _is_patches(key, module)}
    convolutions = {
        key
        for key, module in layers.items()
        if isinstance(module, _CONVOLUTIONS) or _POOL.search(key)
    }
    return convolutions or set(layers)


def _attention_and_mlp(layers: Layers) -> set[str]:
    """What "attention" means, and every other linear layer of the blocks."""
    linear = {
        key
        for key, module in layers.items()
        if isinstance(module, LINEAR) and block_number(key) is not None
    }
    return _attention(layers) | linear


def _all(layers: Layers) -> set[str]:
    """Every linear, attention and convolution layer but a head that predicts words."""
    return {key for key in layers if key not in ("lm_head", "embed_out")}


WORDS: dict[str, Callable[[Layers], set[str]]] = {
    "attention": _attention,
    "attention+mlp": _attention_and_mlp,
    "all": _all,
}


def _is_attention(key: str, module: nn.Module) -> bool:
    if isinstance(module, ATTENTION):
        return True
    number = block_number(key)
    return _ATTENTION.search(".".join(key.split(".")[(number or 0) + 1 :])) is not None


def _is_patches(key: str, module: nn.Module) -> bool:
    """Say whether a layer cuts an image into patches: a convolution that never overlaps itself."""
    return (
        isinstance(module, CONVOLUTIONS)
        and block_number(key) is None
        and module.kernel_size == module.stride
        and max(module.kernel_size) > 1
    )

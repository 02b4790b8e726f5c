"""What the tuners of prefixes share: where their layers stand, and what cannot be a place."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from graftune.adapters.base.hooks import HookedTuner, block_list, check_module
from graftune.adapters.prompts.prefix.config import PrefixConfig


class PrefixTuner(HookedTuner):
    """Base of tuners whose layers are children of attentions."""

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        missing = [n for n in ("blocks", "attention", "projections") if getattr(config, n) is None]
        if missing:
            raise ValueError(
                f"{type(config).__name__} needs {', '.join(missing)}: the names of modules of the "
                "model. graftune.wrap(model, config) finds them in vision transformers of "
                "transformers, timm and open_clip"
            )
        blocks = block_list(check_module(model, "blocks", config.blocks))
        last = max(config.prompted)
        if last >= len(blocks):
            raise ValueError(
                f"there are to be prompts in block {last}, and the model has the blocks 0 to "
                f"{len(blocks) - 1}; give fewer in {type(config).__name__}"
            )
        for number in config.prompted:
            block = blocks[number]
            check_module(block, "attention", config.attention)
        super()._check_targets(model, config)


def block_number(config: PrefixConfig, key: str) -> int:
    """Return the number of the block that the attention of a name is in."""
    inner = key.removeprefix(f"{config.blocks}.")
    return int(inner.partition(".")[0])


def base_module(target: nn.Module) -> nn.Module:
    """Return a module without the tuner layers around it."""
    base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return base


def attention_width(config: PrefixConfig, key: str, attention: nn.Module) -> int:
    """Return the width of keys and values, all heads together.

    Raises:
        TypeError: the attention is of a kind that has no way in for a prefix.
    """
    if isinstance(attention, nn.MultiheadAttention):
        if attention.bias_k is not None:
            raise TypeError(f"{key!r} has keys and values of its own (add_bias_kv=True)")
        return attention.embed_dim
    widths = []
    for name in config.projections or ():
        module = base_module(check_module(attention, "projections", name))
        widths.append(getattr(module, "out_features", None))
    if len(widths) == 1 and widths[0] is not None and widths[0] % 3 == 0:
        return widths[0] // 3
    if len(widths) == 2 and widths[0] is not None and widths[0] == widths[1]:
        return widths[0]
    raise TypeError(
        f"{key!r} ({type(attention).__name__}) is not an attention that prefixes are supported "
        "for: nn.MultiheadAttention, or one with linear layers of equal width for keys and values, "
        f"or with one for queries, keys and values. Given: projections={config.projections}"
    )

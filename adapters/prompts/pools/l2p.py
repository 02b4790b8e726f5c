"""L2P: prompts of a pool join the tokens of an image (arXiv 2112.08654)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftune.adapters.base.hooks import with_hidden
from graftune.adapters.prompts.deep.functional import append_tokens
from graftune.adapters.prompts.pools.functional import similarities
from graftune.adapters.prompts.pools.layer import PoolLayer, with_keys
from graftune.adapters.prompts.pools.model import PoolTuner, query_width


class L2PLayer(PoolLayer):
    """The pool: a child of the first block's attention, hooked around all blocks.

    An adapter's prompts are `l2p_prompts[adapter]`, (M, length, D), their keys `l2p_keys[adapter]`,
    (M, D).
    """

    adapter_layer_names = ("l2p_prompts", "l2p_keys")
    other_param_names = ("chosen",)

    def __init__(self) -> None:
        super().__init__()
        self.l2p_prompts, self.l2p_keys = nn.ParameterDict(), nn.ParameterDict()
        self.chosen: dict[str, int] = {}

    def hook(self, attention: nn.Module, blocks: nn.ModuleList | nn.Sequential) -> None:
        """Hook the prompts around the blocks, once."""
        self.stand_beside(attention)
        self.hook_input(blocks[0], self._before_blocks)
        self.hook_output(blocks[-1], self._after_blocks)

    def update_layer(
        self, adapter_name: str, prompts: Tensor, keys: Tensor, chosen: int, inference_mode: bool
    ) -> None:
        """Add an adapter's pool, or start it afresh."""
        self.l2p_prompts[adapter_name] = nn.Parameter(prompts)
        self.l2p_keys[adapter_name] = nn.Parameter(keys)
        self.chosen[adapter_name] = chosen
        self.activate(adapter_name, inference_mode)

    def answer(self, queries: Tensor) -> None:
        """Choose the prompts whose keys are nearest."""
        name = self.current()
        assert name is not None
        prompts, keys = self.l2p_prompts[name], self.l2p_keys[name]
        alike = similarities(queries.to(keys.dtype), keys)  # (B, M)
        nearest = alike.topk(self.chosen[name], dim=1)
        tokens = prompts[nearest.indices].flatten(1, 2)  # (B, N · length, D)
        self.keep(with_keys(tokens, keys), (1 - nearest.values).sum(1))

    def _before_blocks(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.current() is None:
            return None
        return with_hidden(args, kwargs, lambda hidden: append_tokens(hidden, self.prompt()))

    def _after_blocks(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.current() is None:
            return None
        count = self.prompt().shape[1]
        if isinstance(output, tuple):
            return (output[0][:, :-count], *output[1:])
        return output[:, :-count]


class L2PModel(PoolTuner):
    """A vision transformer with a pool of prompts for its tokens (arXiv 2112.08654).

    Args:
        model: the base model.
        config: an `L2PConfig` that names its modules.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the prompts on the meta device, to be loaded next.
    """

    prefix = "l2p_"
    child = "l2p"
    tuner_layer_cls = L2PLayer

    @classmethod
    def adapter_shapes(
        cls, config: Any, key: str, module: nn.Module, parameter: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of prompts, (M, length, D), and keys, (M, D)."""
        width = query_width(config, module)
        return {
            f"{cls.child}.l2p_prompts": (config.pool_size, config.length, width),
            f"{cls.child}.l2p_keys": (config.pool_size, width),
        }

    def hook_layer(self, config: Any, layer: Any, attention: nn.Module) -> None:
        """Hook the pool around the blocks."""
        layer.hook(attention, self.model.get_submodule(config.blocks))

    def add_adapter(
        self, config: Any, adapter_name: str, layer: Any, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Add prompts and keys to the pool."""
        drawn = [_drawn(shape, config.init_weights) for shape in shapes.values()]
        layer.update_layer(adapter_name, *drawn, config.chosen, config.inference_mode)


def _drawn(shape: tuple[int, ...], init_weights: bool) -> Tensor:
    return 2 * torch.rand(shape) - 1 if init_weights else torch.randn(shape)

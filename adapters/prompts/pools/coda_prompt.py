"""CODA-Prompt: a prefix for each image, composed of components (arXiv 2211.13218)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftune.adapters.prompts.pools.functional import component_weights, grown, orthogonality
from graftune.adapters.prompts.pools.layer import PoolLayer
from graftune.adapters.prompts.pools.model import PoolTuner, query_width
from graftune.adapters.prompts.prefix import Prefix, PrefixLayer
from graftune.adapters.prompts.prefix.model import attention_width


class CodaPromptLayer(PoolLayer, PrefixLayer):
    """The components of one block: a child of its attention.

    An adapter's components are `coda_prompt_components[adapter]`, (M, length, D), with
    `coda_prompt_keys[adapter]` and `coda_prompt_attention[adapter]`, (M, W) each.
    """

    adapter_layer_names = ("coda_prompt_components", "coda_prompt_keys", "coda_prompt_attention")
    other_param_names = ("tasks", "shares")

    def __init__(self) -> None:
        super().__init__()
        self.coda_prompt_components = nn.ParameterDict()
        self.coda_prompt_keys, self.coda_prompt_attention = nn.ParameterDict(), nn.ParameterDict()
        self.shares: dict[str, int] = {}  # components of a task

    def update_layer(
        self,
        adapter_name: str,
        tensors: list[Tensor],
        task: int,
        share: int,
        inference_mode: bool,
    ) -> None:
        """Add an adapter's components, keys and attention, or start them afresh."""
        for name, tensor in zip(self.adapter_layer_names, tensors, strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
        self.tasks[adapter_name], self.shares[adapter_name] = task, share
        self.activate(adapter_name, inference_mode)

    def _grown(self) -> list[Tensor]:
        """Components, keys and attention of the tasks so far; earlier ones get no gradient."""
        name = self.current()
        assert name is not None
        first = self.tasks[name] * self.shares[name]
        tensors = (getattr(self, each)[name] for each in self.adapter_layer_names)
        return [grown(tensor, first, first + self.shares[name]) for tensor in tensors]

    def answer(self, queries: Tensor) -> None:
        """Compose a prefix for each image."""
        components, keys, attention = self._grown()
        weights = component_weights(queries.to(keys.dtype), attention, keys)  # (B, M)
        self.keep(torch.einsum("bm,mld->bld", weights, components))

    def orthogonality(self) -> Tensor | None:
        """Return how far components, keys and attention so far are from orthogonal, added up."""
        if self.current() is None:
            return None
        return torch.stack([orthogonality(rows) for rows in self._grown()]).sum()

    def prefix(self) -> Prefix | None:
        """Return the keys and values that were composed, (B, length / 2, D) each."""
        if self.current() is None:
            return None
        keys, values = self.prompt().chunk(2, dim=-2)
        return keys, values


class CodaPromptModel(PoolTuner):
    """A vision transformer with prefixes composed of components (arXiv 2211.13218).

    Args:
        model: the base model.
        config: a `CodaPromptConfig` that names its modules.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the components on the meta device, to be loaded next.
    """

    prefix = "coda_prompt_"
    child = "coda_prompt"
    tuner_layer_cls = CodaPromptLayer

    @classmethod
    def adapter_shapes(
        cls, config: Any, key: str, module: nn.Module, parameter: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a block's components, keys and attention."""
        width, of_query = attention_width(config, key, module), query_width(config, module)
        return {
            f"{cls.child}.coda_prompt_components": (config.pool_size, config.length, width),
            f"{cls.child}.coda_prompt_keys": (config.pool_size, of_query),
            f"{cls.child}.coda_prompt_attention": (config.pool_size, of_query),
        }

    def add_adapter(
        self, config: Any, adapter_name: str, layer: Any, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Add components, keys and attention to a block's layer."""
        tensors = [_drawn(shape, config.init_weights) for shape in shapes.values()]
        layer.update_layer(adapter_name, tensors, config.task, config.share, config.inference_mode)


def _drawn(shape: tuple[int, ...], init_weights: bool) -> Tensor:
    tensor = torch.empty(shape)
    # An orthogonal start is a decomposition, which tensors without values do not have.
    if init_weights and not tensor.is_meta:
        return nn.init.orthogonal_(tensor)
    return nn.init.normal_(tensor)

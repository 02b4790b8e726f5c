"""DualPrompt: a prefix for all tasks and one for each (arXiv 2204.04799)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftune.adapters.prompts.pools.functional import similarities
from graftune.adapters.prompts.pools.layer import PoolLayer, with_keys
from graftune.adapters.prompts.pools.model import PoolTuner, query_width
from graftune.adapters.prompts.prefix import Prefix, PrefixLayer
from graftune.adapters.prompts.prefix.model import attention_width, block_number


class DualPromptLayer(PoolLayer, PrefixLayer):
    """The prompts of one block: a child of its attention.

    An adapter's prompts are `dual_prompt_prefixes[adapter]`: (1, length, D) in a block with a
    general prompt, else (tasks, length, D) with `dual_prompt_keys[adapter]`, (tasks, D).
    """

    adapter_layer_names = ("dual_prompt_prefixes", "dual_prompt_keys")
    other_param_names = ("tasks",)

    def __init__(self) -> None:
        super().__init__()
        self.dual_prompt_prefixes, self.dual_prompt_keys = nn.ParameterDict(), nn.ParameterDict()

    def update_layer(
        self,
        adapter_name: str,
        prefixes: Tensor,
        keys: Tensor | None,
        task: int,
        inference_mode: bool,
    ) -> None:
        """Add an adapter's prompts, or start them afresh."""
        self.dual_prompt_prefixes[adapter_name] = nn.Parameter(prefixes)
        if keys is not None:
            self.dual_prompt_keys[adapter_name] = nn.Parameter(keys)
        self.tasks[adapter_name] = task
        self.activate(adapter_name, inference_mode)

    def answer(self, queries: Tensor) -> None:
        """Choose the task's own prompt in training, and the one that matches in evaluation."""
        name = self.current()
        assert name is not None
        prefixes, task = self.dual_prompt_prefixes[name], self.tasks[name]
        if name not in self.dual_prompt_keys:
            self.keep(prefixes[0])
            return
        keys = self.dual_prompt_keys[name]
        alike = similarities(queries.to(keys.dtype), keys[: task + 1])  # (B, tasks so far)
        if self.training:
            chosen = prefixes[task].expand(len(queries), -1, -1)
        else:
            chosen = prefixes[alike.argmax(1)]  # (B, length, D)
        self.keep(with_keys(chosen, keys), 1 - alike[:, task])

    def prefix(self) -> Prefix | None:
        """Return the keys and values that were chosen, (B, length / 2, D) each."""
        if self.current() is None:
            return None
        keys, values = self.prompt().chunk(2, dim=-2)
        return keys, values


class DualPromptModel(PoolTuner):
    """A vision transformer with general and expert prompts (arXiv 2204.04799).

    Args:
        model: the base model.
        config: a `DualPromptConfig` that names its modules.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the prompts on the meta device, to be loaded next.
    """

    prefix = "dual_prompt_"
    child = "dual_prompt"
    tuner_layer_cls = DualPromptLayer

    @classmethod
    def adapter_shapes(
        cls, config: Any, key: str, module: nn.Module, parameter: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a block's prompts and, in a block with expert prompts, keys."""
        width = attention_width(config, key, module)
        if block_number(config, key) in config.expert_blocks:
            return {
                f"{cls.child}.dual_prompt_prefixes": (config.tasks, config.expert_length, width),
                f"{cls.child}.dual_prompt_keys": (config.tasks, query_width(config, module)),
            }
        return {f"{cls.child}.dual_prompt_prefixes": (1, config.general_length, width)}

    def add_adapter(
        self, config: Any, adapter_name: str, layer: Any, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Add prompts, and keys where they are expert prompts, to a block's layer."""
        draw = torch.rand if config.init_weights else torch.randn
        prefixes, *keys = (draw(shape) for shape in shapes.values())
        layer.update_layer(
            adapter_name,
            prefixes,
            keys[0] if keys else None,
            config.task,
            config.inference_mode,
        )

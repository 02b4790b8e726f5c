"""OnePrompt as a PEFT tuner."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graftune.adapters.prompts.one.layer import OnePromptLayer
from graftune.adapters.prompts.prefix import PrefixTuner
from graftune.adapters.prompts.prefix.model import attention_width, base_module, block_number


class OnePromptModel(PrefixTuner):
    """A vision transformer with a prefix prompt in each of its first blocks (arXiv 2402.04129).

    Args:
        model: the base model.
        config: a `OnePromptConfig` that names the blocks and their attentions.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the prompts on the meta device, to be loaded next.
    """

    prefix = "one_prompt_"
    child = "one_prompt"
    tuner_layer_cls = OnePromptLayer

    @classmethod
    def adapter_shapes(
        cls, config: Any, key: str, module: nn.Module, parameter: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of a block's prompt: (length, D).

        Raises:
            TypeError: the attention is of a kind that has no way in for a prefix.
        """
        length = config.lengths[block_number(config, key)]
        return {f"{cls.child}.one_prompt_tokens": (length, attention_width(config, key, module))}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        attention = base_module(target)
        layer = getattr(attention, self.child, None)
        if layer is None:
            layer = OnePromptLayer()
            layer.hook(attention, peft_config.projections)
            attention.add_module(self.child, layer)
        (shape,) = self.adapter_shapes(peft_config, current_key, attention).values()
        draw = torch.rand if peft_config.init_weights else torch.randn
        layer.update_layer(adapter_name, draw(shape), peft_config.inference_mode)

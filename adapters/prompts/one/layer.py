"""The prompt of one block."""

from __future__ import annotations

from torch import Tensor, nn

from graftune.adapters.prompts.prefix import Prefix, PrefixLayer


class OnePromptLayer(PrefixLayer):
    """The prompt of one block: a child of its attention.

    An adapter's prompt is `one_prompt_tokens[adapter]`, of shape (length, D): keys, then values.
    """

    adapter_layer_names = ("one_prompt_tokens",)

    def __init__(self) -> None:
        super().__init__()
        self.one_prompt_tokens = nn.ParameterDict()

    def update_layer(self, adapter_name: str, tokens: Tensor, inference_mode: bool) -> None:
        """Add an adapter's prompt, (length, D), or start it afresh."""
        self.one_prompt_tokens[adapter_name] = nn.Parameter(tokens)
        self.activate(adapter_name, inference_mode)

    def prefix(self) -> Prefix | None:
        """Return the active adapter's keys and values, (length / 2, D) each."""
        name = self.current()
        if name is None:
            return None
        keys, values = self.one_prompt_tokens[name].chunk(2)
        return keys, values

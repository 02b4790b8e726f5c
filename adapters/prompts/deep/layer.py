"""The prompts of one tower, and the hooks by which they enter and leave it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from graftune.adapters.base.hooks import HookedLayer, with_hidden
from graftune.adapters.prompts.deep.functional import append_tokens, replace_last, replace_tokens


class DeepPromptLayer(HookedLayer):
    """The prompts of one tower: a child of the module that holds the tower's blocks.

    The blocks are left as they are; hooks on them and on the tower's entry put prompts in, replace
    them and take them out. An adapter's prompts are `deep_prompt_tokens[adapter]`, of shape (blocks
    with prompts, n, D).

    Args:
        start: position of the first prompt in a text; None for a vision tower, whose prompts stand
            at the end of the sequence.
    """

    adapter_layer_names = ("deep_prompt_tokens",)

    def __init__(self, start: int | None) -> None:
        super().__init__()
        self.start = start
        self.deep_prompt_tokens = nn.ParameterDict()

    def hook(
        self, tower: nn.Module, entry: nn.Module, blocks: nn.ModuleList | nn.Sequential
    ) -> None:
        """Hook the prompts into a tower, once.

        Args:
            tower: the module that holds entry and blocks.
            entry: the token embedding, or the module whose input prompts are appended to.
            blocks: the blocks, in the order in which they run.
        """
        if self.start is not None:
            self.hook_output(entry, self._after_embedding)
        else:
            self.hook_input(entry, self._before_blocks)
            self.hook_output(blocks[-1], self._after_blocks)
            self.hook_output(tower, self._after_tower)
        for number, block in enumerate(blocks):
            if number > 0:
                self.hook_input(block, partial(self._before_block, number))
        self.stand_beside(blocks[0])

    def update_layer(self, adapter_name: str, tokens: Tensor, inference_mode: bool) -> None:
        """Add an adapter's prompts, (blocks, n, D), or start them afresh."""
        self.deep_prompt_tokens[adapter_name] = nn.Parameter(tokens)
        self.activate(adapter_name, inference_mode)

    def tokens(self) -> Tensor | None:
        """Return the active adapter's prompts, (blocks, n, D); None when there are none to use."""
        name = self.current()
        return None if name is None else self.deep_prompt_tokens[name]

    # Hooks.

    def _after_embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        tokens = self.tokens()
        if tokens is None:
            return output
        assert self.start is not None
        _check_length(output, self.start, tokens.shape[1])
        return replace_tokens(output, tokens[0], self.start)

    def _before_blocks(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens = self.tokens()
        if tokens is None:
            return None
        return with_hidden(args, kwargs, lambda hidden: append_tokens(hidden, tokens[0]))

    def _before_block(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens = self.tokens()
        if tokens is None or number >= tokens.shape[0]:
            return None
        if self.start is None:
            return with_hidden(args, kwargs, lambda h: replace_last(h, tokens[number]))
        start = self.start
        return with_hidden(args, kwargs, lambda h: replace_tokens(h, tokens[number], start))

    def _after_blocks(self, module: nn.Module, args: Any, output: Any) -> Any:
        tokens = self.tokens()
        if tokens is None:
            return output
        if isinstance(output, tuple):
            return (output[0][:, : -tokens.shape[1]], *output[1:])
        return output[:, : -tokens.shape[1]]

    def _after_tower(self, module: nn.Module, args: Any, output: Any) -> Any:
        tokens = self.tokens()
        if tokens is not None and getattr(output, "hidden_states", None):
            # What transformers recorded on the way, without the prompts.
            length = output.last_hidden_state.shape[1]
            output["hidden_states"] = tuple(hidden[:, :length] for hidden in output.hidden_states)
        if tokens is not None and getattr(output, "attentions", None):
            length = output.last_hidden_state.shape[1]
            output["attentions"] = tuple(a[..., :length, :length] for a in output.attentions)
        return output


def _check_length(hidden: Tensor, start: int, count: int) -> None:
    # After the prompts there has to be room for a name, or at least for the end of the text.
    if hidden.shape[1] < start + count + 1:
        raise ValueError(
            f"a text of {hidden.shape[1]} tokens has no place for {count} prompts from position "
            f"{start} on: texts start with a word for each prompt, as in 'a photo of a dog', and "
            "end behind them; pad them to at least "
            f"{start + count + 1} tokens, or use fewer prompts"
        )

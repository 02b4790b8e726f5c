"""The prompts of one tower, and the hooks by which they enter and leave it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..modules import base_modules
from .functional import append_tokens, replace_last, replace_tokens

NO_MERGE = (
    "prompts are tokens and not a change of the weights, so there is nothing to merge: keep the "
    "adapter attached, or take it off with `unload()`"
)


class DeepPromptLayer(nn.Module, BaseTunerLayer):
    """The prompts of one tower: a child of the module that holds the tower's blocks.

    The blocks are left as they are; hooks on them and on the tower's entry put prompts in, replace
    them and take them out. An adapter's prompts are `deep_prompt_tokens[adapter]`, of shape (blocks
    with prompts, n, D).

    Args:
        start: position of the first prompt in a text; None for a vision tower, whose prompts stand
            at the end of the sequence.
    """

    adapter_layer_names: tuple[str, ...] = ("deep_prompt_tokens",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, start: int | None) -> None:
        super().__init__()
        self.start = start
        self.deep_prompt_tokens = nn.ParameterDict()
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._handles: list[Any] = []

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
            self._handles.append(entry.register_forward_hook(self._after_embedding))
        else:
            self._hook_input(entry, self._before_blocks)
            self._handles.append(blocks[-1].register_forward_hook(self._after_blocks))
            self._handles.append(tower.register_forward_hook(self._after_tower))
        for number, block in enumerate(blocks):
            if number > 0:
                self._hook_input(block, partial(self._before_block, number))
        # Known, and not a child: it has a parent already.
        self.__dict__["first_block"] = blocks[0]

    def _hook_input(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def unhook(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def update_layer(self, adapter_name: str, tokens: Tensor, inference_mode: bool) -> None:
        """Add an adapter's prompts, (blocks, n, D), or start them afresh."""
        self.deep_prompt_tokens[adapter_name] = nn.Parameter(tokens)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        active = self.active_adapters or [adapter_name]
        self.set_adapter(active, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        base: Tensor = next(self.__dict__["first_block"].parameters())
        tokens = self.deep_prompt_tokens[adapter_name]
        if not (tokens.is_meta or base.is_meta):
            dtype = base.dtype if base.is_floating_point() else tokens.dtype
            tokens.data = tokens.data.to(device or base.device, dtype)

    def tokens(self) -> Tensor | None:
        """Return the active adapter's prompts, (blocks, n, D); None when there are none to use.

        Raises:
            ValueError: more than one adapter is active.
        """
        if self.disable_adapters:
            return None
        active = [name for name in self.active_adapters if name in self.deep_prompt_tokens]
        if len(active) > 1:
            raise ValueError(
                f"the prompts of {active} take the same places, so one adapter at a time can be "
                "active: call `set_adapter` with one name"
            )
        return self.deep_prompt_tokens[active[0]] if active else None

    def adapted_tensors(self) -> dict[str, Tensor]:
        """Return the tower's own tensors that identify it, those of its first block."""
        block: nn.Module = self.__dict__["first_block"]
        return {
            f"{key}.{name}": parameter.detach()
            for key, module in base_modules(block)
            for name, parameter in module.named_parameters(recurse=False)
        }

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
        return _with_hidden(args, kwargs, lambda hidden: append_tokens(hidden, tokens[0]))

    def _before_block(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens = self.tokens()
        if tokens is None or number >= tokens.shape[0]:
            return None
        if self.start is None:
            return _with_hidden(args, kwargs, lambda h: replace_last(h, tokens[number]))
        start = self.start
        return _with_hidden(args, kwargs, lambda h: replace_tokens(h, tokens[number], start))

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

    # Merging.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: there is no weight to merge into."""
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the hidden states among a module's arguments: its first, by position or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def _check_length(hidden: Tensor, start: int, count: int) -> None:
    # After the prompts there has to be room for a name, or at least for the end of the text.
    if hidden.shape[1] < start + count + 1:
        raise ValueError(
            f"a text of {hidden.shape[1]} tokens has no place for {count} prompts from position "
            f"{start} on: texts start with a word for each prompt, as in 'a photo of a dog', and "
            "end behind them; pad them to at least "
            f"{start + count + 1} tokens, or use fewer prompts"
        )

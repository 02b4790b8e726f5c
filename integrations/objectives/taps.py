"""Features from inside a model, taken during the one call that also gives its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Tap:
    """A hook that keeps a tensor at a module's input or output while it is switched on.

    It stays on its module, switched off: a compiled graph does not see hooks that come after it,
    but is compiled anew when a switch that it has seen is flipped.
    """

    def __init__(self) -> None:
        self.on = False
        self.tensor: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if self.on:
            self.tensor = args[0] if output is None else output

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Listen, if `on`, to the calls in this context."""
        self.on, self.tensor = on, None
        try:
            yield
        finally:
            self.on = False

    def take(self) -> torch.Tensor:
        """Return the tensor of the last call, and forget it.

        Raises:
            RuntimeError: there is none: the call ran a graph that is older than the tap.
        """
        tensor, self.tensor = self.tensor, None
        if tensor is None:
            raise RuntimeError(
                "no features came out of the model: it was compiled before this objective first "
                "called it, or does not use the layer they are taken from; in the first case call "
                "torch.compiler.reset() before the objective"
            )
        return tensor


def tap_input(module: nn.Module | None) -> Tap:
    """Return the tap at a module's first positional input, placing one if there is none yet.

    None is a module that nothing comes out of.
    """
    if module is None:
        return Tap()
    return _placed(module._forward_pre_hooks) or _place(module.register_forward_pre_hook)


def tap_output(module: nn.Module | None) -> Tap:
    """Return the tap at a module's output, as `tap_input` does at its input."""
    if module is None:
        return Tap()
    return _placed(module._forward_hooks) or _place(module.register_forward_hook)


def _placed(hooks: Mapping[int, Any]) -> Tap | None:
    return next((hook for hook in hooks.values() if isinstance(hook, Tap)), None)


def _place(register: Callable[[Tap], Any]) -> Tap:
    tap = Tap()
    register(tap)
    return tap

"""A causal text tower never looks past the end of a text: what lies behind is left out.

transformers' towers take shorter sequences as they are. open_clip's add all positions at once and
have a mask of the full length: there the sequence is cut where it enters the blocks, and filled up
with zeros, which nothing reads, where it leaves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from graftune.adapters.base.messages import warn_once


@contextmanager
def cut_after_end(model: nn.Module, base: nn.Module, text: torch.Tensor) -> Iterator[None]:
    """Let open_clip's text blocks run on the texts up to their ends, for one forward pass.

    Args:
        model: the model as it is called, wrapped or not.
        base: open_clip's own model within it.
        text: token ids, (T, length), each with its end of text.
    """
    tower = getattr(base, "text", base)
    blocks = getattr(tower, "transformer", None)
    if not _is_causal(tower):
        say_not_cut(base)
        yield
        return
    longest = int(_ends(tower, text).max()) + 1
    if blocks is None or longest >= text.shape[1] or _is_compiled(model):
        yield  # compiled code does not see hooks that come and go
        return

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attn_mask")
        if mask is not None:
            kwargs = {**kwargs, "attn_mask": mask[..., :longest, :longest]}
        return (args[0][:, :longest], *args[1:]), kwargs

    def leave(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return F.pad(output, (0, 0, 0, text.shape[1] - longest))

    handles = [
        blocks.register_forward_pre_hook(enter, with_kwargs=True),
        blocks.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def say_not_cut(base: nn.Module) -> None:
    """Say once that a model's texts keep their full length."""
    warn_once(
        f"{type(base).__name__} not causal",
        f"the text tower of this {type(base).__name__} is not causal, or pools elsewhere than at "
        "the end of a text: its texts are not cut there",
    )


def _pool(tower: Any) -> str:
    return getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax"))


def _ends(tower: Any, text: torch.Tensor) -> torch.Tensor:
    """The position of each text's end, where the tower takes its feature: (T, length) to (T,)."""
    if _pool(tower) == "eos":
        end: int = tower.text_eos_id if hasattr(tower, "text_eos_id") else tower.eos_id
        return (text == end).int().argmax(dim=-1)
    return text.argmax(dim=-1)


def _is_causal(tower: Any) -> bool:
    mask = getattr(tower, "attn_mask", None)
    appended = getattr(tower, "cls_emb", None)
    return mask is not None and appended is None and _pool(tower) in ("argmax", "eos")


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(module, "_orig_mod") for module in model.modules())

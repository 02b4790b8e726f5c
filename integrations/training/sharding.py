"""Adapters whose tensors are spread over processes: saved whole, or not at all."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from graftune.adapters.base.checkpoint import check_not_empty
from graftune.adapters.base.sharded import is_sharded, whole


def any_sharded(model: nn.Module) -> bool:
    """Say whether parameters of a model are spread over processes, as FSDP 2 spreads them."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def whole_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """Return a sharded model's state with its adapters gathered and its base model left out.

    Every process has to call it; what it returns is for `save_pretrained`, which alone would write
    the part of the adapter that one process holds, or fail.

    Example:
        >>> state = whole_state_dict(model)
        >>> model.save_pretrained("adapter", state_dict=state, is_main_process=rank == 0)
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    # Adapters that are not the active one are frozen, and still part of what is saved.
    tuner: Any = model.base_model
    tuners = getattr(tuner, "tuners", [tuner])  # of several methods, or the one there is
    marks = [
        "modules_to_save.",
        *(getattr(t, "prefix", None) or "modules_to_save." for t in tuners),
    ]
    state = {}
    for name, tensor in model.state_dict().items():
        if not is_sharded(tensor):
            state[name] = tensor
        elif name in trained or any(mark in name for mark in marks):
            state[name] = whole(tensor.detach()).cpu()
    return state


def check_state(model: PeftModel, state_dict: dict[str, Tensor]) -> None:
    """Raise ValueError if an adapter about to be written is empty or in parts."""
    for name in model.peft_config:
        tensors = get_peft_model_state_dict(
            model, state_dict, adapter_name=name, save_embedding_layers=False
        )
        check_not_empty(tensors, name)

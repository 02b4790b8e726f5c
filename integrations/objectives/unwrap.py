"""What a model returns and is, whatever it is wrapped in."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn


def base_of(model: nn.Module) -> Any:
    """Return the library's own model under DDP, FSDP, torch.compile and PEFT."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def tensor_of(output: Any, name: str, model: nn.Module) -> torch.Tensor:
    """Return the tensor called `name` of a model's output, or the output if it is a tensor.

    Raises:
        TypeError: the output is neither a tensor nor has one of that name.
    """
    tensor = getattr(output, name, output)
    if not torch.is_tensor(tensor):
        raise TypeError(
            f"{type(base_of(model)).__name__} returned a {type(output).__name__} without {name!r}; "
            f"give a model that returns a tensor, or an output with {name!r}"
        )
    return tensor

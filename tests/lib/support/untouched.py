"""Proof that a refused call left a model exactly as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching an adapter could change."""
    return {
        "modules": [(name, type(m), id(m)) for name, m in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": sorted(vars(model)),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values = before.pop("values")
    for name, tensor in after.pop("values").items():
        assert torch.equal(tensor, values[name])
    assert after == before

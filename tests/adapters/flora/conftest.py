"""Fixtures of FLoRA's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from graftune.adapters.flora import FloraConfig, FloraLayer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="adapt")
def fixture_adapt() -> Callable[..., tuple[PeftModel, FloraLayer]]:
    """Adapt one module inside a model; return the model and the layer. The start is random."""

    def adapt(module: nn.Module, adapter_name: str = "default", **config: Any):
        model = nn.Sequential(module)
        config = {"target_modules": ["0"], "init_weights": False} | config
        peft_model = get_peft_model(
            model, FloraConfig(**config), adapter_name, autocast_adapter_dtype=False
        )
        return peft_model, peft_model.base_model.model[0]

    return adapt

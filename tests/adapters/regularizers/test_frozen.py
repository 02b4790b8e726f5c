"""The frozen model is the base model, and leaving it leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn

import graftune
from graftune.adapters.base.frozen import frozen_base
from support.models import MODELS

FAMILIES = ["transformers-clip", "transformers-llama", "open_clip-vit", "torch-cnn"]


def adapted(family: str, method: str) -> nn.Module:
    options = {"r": 2, "init_lora_weights": False} if method == "lora" else {}
    config = LoraConfig(**options) if method == "lora" else graftune.FloraConfig(init_weights=False)
    if family == "open_clip-vit" and method == "lora":
        config.target_modules = {"c_fc", "c_proj"}
    if family == "torch-cnn" and method == "lora":
        config.target_modules = {"stem", "head"}
    return graftune.wrap(MODELS[family].build(), config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "flora"])
def test_frozen_is_the_base_model(family: str, method: str) -> None:
    case = MODELS[family]
    base = case.run(case.build(), case.batch())
    model = adapted(family, method).train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    with frozen_base(model):
        frozen = case.run(model, case.batch())
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, base.detach(), rtol=1e-5, atol=1e-6)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert (case.run(model.eval(), case.batch()) - base).abs().max() > 1e-3


def test_frozen_leaves_a_partly_frozen_adapter_as_it_is() -> None:
    model = adapted("torch-cnn", "flora")
    first = next(p for p in model.parameters() if p.requires_grad)
    first.requires_grad_(False)
    with frozen_base(model):
        pass
    assert not first.requires_grad


def test_frozen_after_an_error_is_left() -> None:
    model = adapted("torch-cnn", "flora").train()
    with pytest.raises(RuntimeError), frozen_base(model):
        raise RuntimeError
    assert model.training
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())


def test_prompts_of_peft_are_off() -> None:
    case = MODELS["transformers-llama"]
    base = case.run(case.build(), case.batch())
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(case.build(), config)
    assert (case.run(model, case.batch()) - base).abs().max() > 1e-4
    with frozen_base(model):
        torch.testing.assert_close(case.run(model, case.batch()), base.detach())


def test_modules_to_save_are_off() -> None:
    case = MODELS["transformers-vit"]
    model = graftune.wrap(case.build(), "flora", modules_to_save=["classifier"])
    base = case.run(model, case.batch()).detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    with frozen_base(model):
        torch.testing.assert_close(case.run(model, case.batch()), base)

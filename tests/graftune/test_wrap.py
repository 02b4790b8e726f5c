"""`graftune.wrap`: defaults for a family, any PEFT config, and one clear error before anything."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import graftune
from support.models import MODELS
from support.untouched import assert_untouched, snapshot


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_family_wraps_with_defaults(name: str) -> None:
    model = graftune.wrap(MODELS[name].build(), "flora", r=2)
    assert isinstance(model, peft.PeftModel)
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total


# PEFT's LoRA fails on the small CNN: it pads twice where a convolution reflects its border.
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"torch-cnn"}))
def test_a_config_of_peft_gets_the_same_defaults(name: str) -> None:
    case = MODELS[name]
    model = graftune.wrap(case.build(), peft.LoraConfig(r=2))
    expected = case.run(case.build(), case.batch())
    torch.testing.assert_close(case.run(model, case.batch()), expected, rtol=1e-4, atol=1e-5)


def test_the_config_is_copied_and_overridden() -> None:
    config = graftune.FloraConfig(r=4, target_modules=["fc1"])
    given = copy.deepcopy(config)
    model = graftune.wrap(MODELS["transformers-vit"].build(), config, r=2, scale=0.5)
    assert config == given
    active = model.peft_config["default"]
    assert (active.r, active.scale, active.target_modules) == (2, 0.5, {"fc1"})


def test_task_types_of_transformers_heads() -> None:
    model = graftune.wrap(MODELS["transformers-llama"].build(), "flora")
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_a_second_adapter_is_added_and_not_activated() -> None:
    model = graftune.wrap(MODELS["transformers-vit"].build(), "flora", r=2)
    assert graftune.wrap(model, "flora", adapter_name="b", r=3) is model
    assert model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="already has an adapter 'b'"):
        graftune.wrap(model, "flora", adapter_name="b")
    with pytest.raises(
        ValueError, match=r"model with one adapter, and this one has 'default', 'b'"
    ):
        graftune.wrap(model, peft.LoraConfig(), adapter_name="c")


def test_modules_to_save() -> None:
    model = graftune.wrap(
        MODELS["transformers-vit"].build(), "flora", modules_to_save=["classifier"]
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trainable)
    assert any("flora_core" in name for name in trainable)


Attach = Callable[[nn.Module], Any]


@pytest.mark.parametrize(
    ("attach", "error", "message"),
    [
        (lambda m: graftune.wrap(m, "floar"), ValueError, "Did you mean 'flora'"),
        (lambda m: graftune.wrap(m, 3), TypeError, "recipe's name or a PEFT config"),
        (lambda m: graftune.wrap(m, "flora", rank=3), ValueError, "no field 'rank'"),
        (lambda m: graftune.wrap(m, "flora", dropot=0.1), ValueError, "Did you mean 'dropout'"),
        (lambda m: graftune.wrap(m, "flora", r=0), ValueError, "r"),
        (lambda m: graftune.wrap(m, "flora", r=-2), ValueError, "r"),
        (lambda m: graftune.wrap(m, "flora", r=[4, 4, 4]), ValueError, r"4, 4, 4"),
        (lambda m: graftune.wrap(m, "flora", r=[4, 0]), ValueError, "0"),
        (lambda m: graftune.wrap(m, "flora", r="8"), (TypeError, ValueError), "r"),
        (lambda m: graftune.wrap(m, "flora", dropout=1.0), ValueError, "dropout"),
        (
            lambda m: graftune.wrap(m, "flora", target_modules=["fc3"]),
            ValueError,
            r"(?s)fc3.*Did you mean.*fc[12].*can be adapted.*fc1",
        ),
        (
            lambda m: graftune.wrap(m, "flora", target_modules=["layernorm_before"]),
            (TypeError, ValueError),
            "LayerNorm",
        ),
        (
            lambda m: graftune.wrap(m, "flora", target_modules=["fc1"], exclude_modules=["fc1"]),
            ValueError,
            "exclude_modules",
        ),
        (
            lambda m: graftune.wrap(m, "flora", target_modules=["fc1"], layers_to_transform=[9]),
            ValueError,
            "layers_to_transform",
        ),
        (
            lambda m: graftune.wrap(m, "flora", layers_pattern="layer"),
            ValueError,
            "layers_to_transform",
        ),
        (
            lambda m: peft.get_peft_model(m, graftune.FloraConfig(target_modules=["fc3"])),
            ValueError,
            "fc3",
        ),
        # Half of the targets are fine: none of them may be attached.
        (
            lambda m: peft.get_peft_model(
                m, graftune.FloraConfig(target_modules=["fc1", "layernorm_before"])
            ),
            (TypeError, ValueError),
            "LayerNorm",
        ),
        (
            lambda m: peft.get_peft_model(
                m, graftune.FloraConfig(r=[2, 2], target_modules=["fc1", "projection"])
            ),
            ValueError,
            r"projection",
        ),
        # PEFT finds out half-way: what it had changed is put back.
        (
            lambda m: graftune.wrap(m, peft.LoraConfig(target_modules=["fc1", "layernorm_after"])),
            ValueError,
            "LayerNorm",
        ),
    ],
)
def test_bad_input_is_one_error_and_leaves_the_model_alone(
    attach: Attach, error: type[Exception], message: str
) -> None:
    model = MODELS["transformers-vit"].build()
    before = snapshot(model)
    with pytest.raises(error) as raised:
        attach(model)
    assert re.search(message, str(raised.value)), str(raised.value)
    assert_untouched(model, before)


def test_a_refused_second_adapter_leaves_the_first_alone() -> None:
    model = graftune.wrap(MODELS["transformers-vit"].build(), "flora", r=2)
    before = snapshot(model)
    for attach in (
        lambda: graftune.wrap(model, "flora", adapter_name="b", target_modules=["nothing"]),
        lambda: model.add_adapter("b", graftune.FloraConfig(target_modules=["nothing"])),
    ):
        with pytest.raises(ValueError, match="nothing"):
            attach()
        assert list(model.peft_config) == ["default"]
        assert_untouched(model, dict(before))


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(TypeError, match="Module or a pipeline of diffusers, got object"):
        graftune.wrap(object(), "flora")


def test_a_model_with_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match="target_parameters"):
        graftune.wrap(nn.Sequential(nn.LayerNorm(4)), "flora")


def test_recipes_name_their_paper() -> None:
    for name, recipe in graftune.recipes().items():
        assert recipe.name == name
        assert re.search(r"\d{4}\.\d{5}", recipe.paper)
    graftune.recipes().clear()
    assert graftune.recipes()

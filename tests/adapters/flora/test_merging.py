"""Merging: exact to undo, the same in one go or in turns, safe when asked."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from graftune.adapters.flora import FloraConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def model_with_two(dtype: torch.dtype = torch.float32):
    base = nn.Sequential(nn.Linear(32, 32), nn.Unflatten(1, (32, 1)), nn.Conv1d(32, 8, 1)).to(dtype)
    config = FloraConfig(r=4, target_modules=["0", "2"], init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("other", copy.deepcopy(config))
    return base, model


def weights(model) -> list[torch.Tensor]:
    inner = model.base_model.model
    return [inner[i].base_layer.weight.detach().clone() for i in (0, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_is_exact(dtype) -> None:
    base, model = model_with_two(dtype)
    model.merge_adapter(["default", "other"])
    assert not torch.equal(weights(model)[0], base[0].weight)
    model.unmerge_adapter()
    assert all(map(torch.equal, weights(model), (base[0].weight, base[2].weight)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_turns_is_together_and_rounded_once(dtype) -> None:
    base, model = model_with_two(dtype)
    model.merge_adapter(["default", "other"])
    together = weights(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(["other"])
    assert all(map(torch.equal, weights(model), together))
    layer = model.base_model.model[0]
    expected = base[0].weight.float()
    for adapter in ("default", "other"):
        expected = expected + layer.get_delta_weight(adapter).float()
    assert torch.equal(together[0], expected.to(dtype))


def test_safe_merge_leaves_the_base_alone() -> None:
    base, model = model_with_two()
    model.base_model.model[0].flora_core["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(weights(model)[0], base[0].weight)
    assert not model.base_model.model[0].merged


def test_a_tied_weight_comes_back_exactly() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    base = Tied()
    config = FloraConfig(r=2, target_modules=["embed", "head"], init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.head.base_layer.weight, base.head.weight)


def test_disabling_a_merged_adapter_gives_the_base() -> None:
    base, model = model_with_two()
    x = torch.randn(3, 32)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_merged_weight_is_a_plain_module_again() -> None:
    base, model = model_with_two()
    x = torch.randn(3, 32)
    expected = model(x)
    plain = model.merge_and_unload(adapter_names=["default"])
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(plain(x), expected)


def test_scales_are_those_of_the_moment(adapt) -> None:
    base = nn.Linear(32, 32)
    model, layer = adapt(base, r=4, scale=2.0, scale_pattern={"0": 3.0})
    full = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * full)
    layer.scale_layer(3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * full)
    layer.unscale_layer(3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * full)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), full)
    assert layer.scaling == {"default": 3.0}
    layer.set_scale("nobody", 0.5)
    assert layer.scaling == {"default": 3.0}
    x = torch.randn(2, 32)
    torch.testing.assert_close(model(x), base(x) + x @ full.T)

"""Factored, dense and merged give one output, for every supported layer and geometry."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftune.adapters.flora import FloraConfig

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def check(base: nn.Module, x: torch.Tensor, r, *args, **kwargs) -> None:
    """Check chain = dense = two operations = merged, outputs and gradients, in float64."""
    base = base.double()
    base.requires_grad_(False)
    config = FloraConfig(r=r, scale=0.8, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        weight = base.weight + layer.get_delta_weight("default")
    expected = torch.func.functional_call(base, {"weight": weight}, (x, *args), kwargs)
    cotangent = torch.randn_like(expected)
    found = {}
    for way in ("chain", "dense", "two operations"):
        layer.uses_chain["default"] = way == "chain"
        if way == "two operations":
            layer._can_run_as_one = lambda: False
        inputs = x.clone().requires_grad_(x.is_floating_point())
        output = layer(inputs, *args, **kwargs)
        torch.testing.assert_close(output, expected)
        wanted = [*layer.flora_core.parameters(), *layer.flora_factor0.parameters()]
        wanted += [*layer.flora_factor1.parameters()]
        wanted += [inputs] if inputs.requires_grad else []
        found[way] = torch.autograd.grad(output, wanted, cotangent)
    for way in ("dense", "two operations"):
        for mine, theirs in zip(found["chain"], found[way], strict=True):
            torch.testing.assert_close(mine, theirs)
    layer.merge()
    torch.testing.assert_close(layer(x, *args, **kwargs), expected)


@pytest.mark.parametrize("r", [3, [2, 5], [5, 2]])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
@pytest.mark.parametrize("sizes", [(6, 9), (9, 6)])
def test_linear(r, leading, sizes) -> None:
    x = torch.randn(*leading, sizes[0], dtype=torch.float64)
    check(nn.Linear(*sizes), x, r)
    if leading:
        check(Conv1D(sizes[1], sizes[0]), x, r)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_convolution(data) -> None:
    axes = data.draw(st.sampled_from([1, 2, 2, 3]))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    several = st.tuples(*[st.integers(1, 3)] * axes)
    kernel = data.draw(several)
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = data.draw(st.sampled_from(["same", "valid"]) | st.tuples(*[st.integers(0, 2)] * axes))
    base = CONV[axes](
        groups * data.draw(st.integers(1, 4)),
        groups * data.draw(st.integers(1, 4)),
        kernel,
        stride=(1,) * axes if padding == "same" else data.draw(several),
        dilation=data.draw(st.tuples(*[st.integers(1, 2)] * axes)),
        padding=padding,
        groups=groups,
        padding_mode=mode,
        bias=data.draw(st.booleans()),
    )
    ranks = data.draw(
        st.integers(1, 5) | st.lists(st.integers(1, 5), min_size=axes + 2, max_size=axes + 2)
    )
    leading = data.draw(st.sampled_from([(2,), (1,), ()]))
    x = torch.randn(*leading, base.in_channels, *[6] * axes, dtype=torch.float64)
    check(base, x, ranks)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_transposed_convolution(data) -> None:
    axes = data.draw(st.sampled_from([1, 2, 2, 3]))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    several = st.tuples(*[st.integers(1, 3)] * axes)
    stride = data.draw(several)
    dilation = data.draw(several)
    extra = tuple(
        data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    base = TRANSPOSED[axes](
        groups * data.draw(st.integers(1, 4)),
        groups * data.draw(st.integers(1, 4)),
        data.draw(several),
        stride=stride,
        padding=data.draw(st.tuples(*[st.integers(0, 1)] * axes)),
        output_padding=extra,
        groups=groups,
        bias=data.draw(st.booleans()),
        dilation=dilation,
    )
    leading = data.draw(st.sampled_from([(2,), (1,), ()]))
    x = torch.randn(*leading, base.in_channels, *[5] * axes, dtype=torch.float64)
    check(base, x, data.draw(st.integers(1, 5)))


def test_transposed_convolution_with_output_size() -> None:
    base = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    for size in ([9, 9], [10, 10], [9, 10]):
        check(base, x, 2, output_size=size)


def test_channels_last_is_kept(adapt) -> None:
    model, layer = adapt(nn.Conv2d(64, 64, 3, padding=1), r=4)
    assert layer.uses_chain["default"]
    x = torch.randn(2, 64, 8, 8)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    output = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_a_layer_that_computes_in_its_own_way_runs_with_the_changed_weight(adapt) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias)

    base = Standardised(32, 32, 3)
    x = torch.randn(2, 32, 6, 6)
    model, layer = adapt(base, r=2)
    output = model(x)
    weight = base.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(output, torch.func.functional_call(base, {"weight": weight}, (x,)))
    model.merge_adapter()
    torch.testing.assert_close(model(x), output)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="dropout=0.5 does not act on '0'"):
        model, layer = adapt(copy.deepcopy(base), r=2, dropout=0.5)
    assert torch.equal(model(x), model(x))


def test_dropout_acts_on_the_input_of_the_branch_alone(adapt) -> None:
    base = nn.Linear(64, 48, bias=False)
    model, layer = adapt(base, r=4, dropout=0.5)
    x = torch.ones(4096, 64)
    torch.manual_seed(1)
    branch = model(x) - base(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(
        branch, dropped @ layer.get_delta_weight("default").T, atol=1e-5, rtol=1e-4
    )
    model.eval()
    torch.testing.assert_close(
        model(x), x @ (base.weight + layer.get_delta_weight("default")).T, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", ["own", "float32"])
def test_half_precision(dtype, adapter_dtype) -> None:
    for base, x in (
        (nn.Linear(64, 64), torch.randn(3, 64)),
        (nn.Linear(4, 4), torch.randn(3, 4)),
        (nn.Conv2d(32, 32, 3), torch.randn(2, 32, 5, 5)),
        (nn.Conv2d(8, 8, 3, groups=8), torch.randn(2, 8, 5, 5)),
        (nn.ConvTranspose2d(32, 32, 3), torch.randn(2, 32, 5, 5)),
    ):
        config = FloraConfig(r=2, target_modules=["0"], init_weights=False)
        model = get_peft_model(
            nn.Sequential(base).to(dtype), config, autocast_adapter_dtype=adapter_dtype == "float32"
        )
        layer = model.base_model.model[0]
        output = model(x.to(dtype))
        assert output.dtype == dtype
        assert layer.get_delta_weight("default").dtype == layer.flora_core["default"].dtype
        model.merge_adapter()
        assert base.weight.dtype == dtype
        torch.testing.assert_close(model(x.to(dtype)), output, atol=0.03, rtol=0.03)

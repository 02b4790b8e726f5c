"""Layers with few trained entries: outputs and gradients are those of the dense layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graftune
from graftune.adapters.sara import places as places_module
from graftune.adapters.sara.layer import SaraLayer
from graftune.adapters.sara.weight import WrittenWeight


class PaddedWeird(nn.Conv2d):
    """A convolution that standardises its weight, as some models' do."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Scaled(nn.Module):
    """A module with a parameter of its own, and another module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(6))
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gate


def drawn(module: nn.Module) -> nn.Module:
    """A module with random weights, where its own are all the same."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 9), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 9, bias=False), (6,)),
    "conv1d of transformers": (lambda: Conv1D(9, 6), (3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 7, 7)),
    "conv2d reflected": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (2, 4, 7, 7),
    ),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=2), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
    "standardised": (lambda: PaddedWeird(4, 6, 3), (2, 4, 7, 7)),
    "layer norm": (lambda: drawn(nn.LayerNorm(6)), (3, 6)),
    "group norm": (lambda: drawn(nn.GroupNorm(2, 6)), (3, 6, 4)),
    "own parameter": (Scaled, (3, 6)),
    "embedding": (lambda: nn.Embedding(11, 5, padding_idx=2), ()),
    "embedding by frequency": (lambda: nn.Embedding(11, 5, scale_grad_by_freq=True), ()),
}


def inputs(shape: tuple[int, ...]) -> Tensor:
    if not shape:
        return torch.tensor([[1, 2, 3], [10, 1, 2]])
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("block", [4, 2**20], ids=["in blocks", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_layer(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "BLOCK", block)
    make, shape = CASES[name]
    torch.manual_seed(0)
    dense = nn.Sequential(make()).double()
    sparse = nn.Sequential(make()).double()
    sparse.load_state_dict(dense.state_dict())
    model = graftune.wrap(sparse, "sara", fraction=0.4, init_weights=False)
    layers = {
        key.removeprefix("base_model.model.").replace("base_layer.", ""): layer
        for key, layer in model.named_modules()
        if isinstance(layer, SaraLayer)
    }
    with torch.no_grad():
        for key, layer in layers.items():
            for own_name, places in layer.places["default"].items():
                parameter = dense.get_parameter(f"{key}.{own_name}")
                values = layer.values("default", own_name)
                parameter.copy_(places.put(parameter, values, parameter.dtype))

    x = inputs(shape)
    y = x.detach().clone().requires_grad_(x.is_floating_point())
    expected, actual = dense(x), model(y)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    if shape:
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-10, atol=1e-12)
    for key, layer in layers.items():
        for own_name, places in layer.places["default"].items():
            gradient = dense.get_parameter(f"{key}.{own_name}").grad
            values = layer.values("default", own_name)
            torch.testing.assert_close(values.grad, places.take(gradient), rtol=1e-10, atol=1e-12)


def test_output_size_of_a_transposed_convolution() -> None:
    base = nn.ConvTranspose2d(3, 4, 3, stride=2)
    x = torch.randn(1, 3, 5, 5)
    expected = base(x, output_size=[12, 12])
    model = graftune.wrap(nn.ModuleList([base]), "sara", fraction=0.2)
    assert torch.equal(model.base_model.model[0](x, output_size=[12, 12]), expected)


def test_gradients_of_gradients() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model = graftune.wrap(base, "sara", fraction=0.5)
    layer = model.base_model.model[0]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(values: Tensor, x: Tensor) -> Tensor:
        places, base = layer.places["default"]["weight"], layer.base_layer.weight.detach
        weight = WrittenWeight(layer.own_weight, "default", places, base)
        return layer._run(layer.base_layer, values, weight, None, x)

    values = layer.values("default", "weight").detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (values, x))
    assert torch.autograd.gradgradcheck(run, (values, x))


def test_no_dense_gradient_outlives_the_backward_pass() -> None:
    """What backward leaves behind, and what it holds at its height, in bytes."""
    width, rows = 512, 8
    model = graftune.wrap(
        nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4))),
        "sara",
        fraction=0.1,
    )
    x = torch.randn(rows, width)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(id(tensor)) or tensor, lambda tensor: tensor
    ):
        loss = model(x).square().sum()
    known = {id(p) for p in model.parameters()}
    saved = [key for key in kept if key not in known]
    assert len(saved) <= 5  # inputs of the layers, and the square's
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
        assert (parameter.grad is not None) == parameter.requires_grad

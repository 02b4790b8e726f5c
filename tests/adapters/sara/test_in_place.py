"""Values that live in the weight: when they are there, and that they leave it as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import graftune
from graftune import SaraConfig
from graftune.adapters.sara.layer import SaraLayer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 6),
        nn.Linear(6, 5),
        nn.Unflatten(-1, (5, 1)),
        nn.Flatten(0, 0),
        nn.Conv1d(5, 4, 1),
    )


IDS = torch.tensor([1, 5, 10])
WEIGHTS = ("0", "1", "4")


def adapted(base: nn.Module | None = None) -> Any:
    base = net() if base is None else base
    torch.manual_seed(1)  # of the values, which start beside the weights' own
    return graftune.wrap(base, "sara", fraction=0.4, init_weights=False, regularizers=[])


def layers(model: nn.Module) -> dict[str, SaraLayer]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, SaraLayer)}
    return {name.rpartition(".")[2]: layer for name, layer in found.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The memory of the base model's weights, as it is."""
    return {name: layers(model)[name].base_layer.weight.detach().clone() for name in WEIGHTS}


def is_base(model: nn.Module) -> bool:
    own = dict(net().named_parameters())
    return all(torch.equal(w, own[f"{name}.weight"]) for name, w in weights(model).items())


def holds(model: nn.Module, adapter: str = "default") -> bool:
    return all(
        torch.equal(
            layers(model)[name].places[adapter]["weight"].take(weight),
            layers(model)[name].values(adapter, "weight"),
        )
        for name, weight in weights(model).items()
    )


def test_values_are_in_the_weights_from_the_first_call_on() -> None:
    model = adapted()
    assert is_base(model)
    output = model(IDS)
    assert holds(model)
    assert not is_base(model)
    output.sum().backward()
    assert holds(model)


def switched_off(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def disabled(model: Any) -> Any:
    with model.disable_adapter():
        assert is_base(model)
        model(IDS)
    return model


def other_active(model: Any) -> Any:
    model.add_adapter("other", SaraConfig(fraction=0.2))
    assert is_base(model)  # that others are selected from
    model(IDS)
    model.set_adapter("other")
    return model


def deleted(model: Any) -> Any:
    model.add_adapter("other", SaraConfig(fraction=0.2))
    model(IDS)
    model.delete_adapter("default")
    return model


def merged_and_back(model: Any) -> Any:
    model.merge_adapter()
    assert holds(model)
    model(IDS)
    model.unmerge_adapter()
    return model


def state_taken(model: Any) -> Any:
    own = dict(net().named_parameters())
    state = model.get_base_model().state_dict()
    assert all(torch.equal(state[f"{n}.base_layer.weight"], own[f"{n}.weight"]) for n in WEIGHTS)
    return model


def state_loaded(model: Any) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(IDS)
    model.load_state_dict(state)
    return model


def copied(model: Any) -> Any:
    return switched_off(copy.deepcopy(model))


def pickled(model: Any) -> Any:
    return switched_off(pickle.loads(pickle.dumps(model)))


def moved(model: Any) -> Any:
    return model.to(torch.float64).to(torch.float32)


@pytest.mark.parametrize(
    "leave",
    [
        switched_off,
        disabled,
        other_active,
        deleted,
        merged_and_back,
        state_taken,
        state_loaded,
        copied,
        pickled,
        moved,
    ],
)
def test_the_base_models_own_are_put_back_bit_for_bit(leave: Callable[[Any], Any]) -> None:
    model = adapted()
    model(IDS)
    assert is_base(leave(model))


def test_unloaded_models_are_the_base_model() -> None:
    model = adapted()
    model(IDS)
    unloaded = model.unload()
    for name, tensor in net().state_dict().items():
        assert torch.equal(unloaded.state_dict()[name], tensor)


def test_changes_without_a_trace_are_seen() -> None:
    """Optimizers and moving averages that write to `.data` leave no mark on a parameter."""
    model = adapted()
    x = torch.randn(3, 6)
    layer = layers(model)["1"]
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            layer(x)
            for values in layer.sara_values.parameters():
                values.data.neg_()
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.requires_grad]  # type: ignore[misc]


def base_in_between(model: Any) -> None:
    with torch.no_grad(), model.disable_adapter():
        model(IDS)


def other_in_between(model: Any) -> None:
    model.set_adapter("other")
    model(IDS)
    model.set_adapter("default")


def state_in_between(model: Any) -> None:
    model.state_dict()


@pytest.mark.parametrize(
    "happens", [base_in_between, other_in_between, state_in_between], ids=lambda f: f.__name__
)
def test_gradients_are_those_of_the_values_of_the_forward_pass(
    happens: Callable[[Any], None],
) -> None:
    model, expected = adapted(), adapted()
    for each in (model, expected):
        torch.manual_seed(1)
        each.add_adapter("other", SaraConfig(fraction=0.2, init_weights=False))
    output = model(IDS)
    happens(model)
    output.square().sum().backward()
    expected(IDS).square().sum().backward()
    for one, other in zip(gradients(model), gradients(expected), strict=True):
        assert torch.equal(one, other)


def merged(model: Any) -> None:
    model.merge_adapter()


def unloaded(model: Any) -> None:
    model.unload()


def off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def gone(model: Any) -> None:
    model.delete_adapter("default")


@pytest.mark.parametrize("happens", [merged, unloaded, off, gone], ids=lambda f: f.__name__)
def test_gradients_after_the_end_leave_the_weights_alone(happens: Callable[[Any], None]) -> None:
    model, expected = adapted(), adapted()
    found = list(layers(model).values())
    values = [p for layer in found for p in layer.sara_values["default"].parameters()]
    output = model(IDS)
    happens(model)
    before = [layer.base_layer.weight.detach().clone() for layer in found]
    output.square().sum().backward()
    assert all(
        torch.equal(layer.base_layer.weight, w) for layer, w in zip(found, before, strict=True)
    )
    expected(IDS).square().sum().backward()
    wanted = [p.grad for x in layers(expected).values() for p in x.sara_values.parameters()]
    for one, other in zip(values, wanted, strict=True):
        if happens is not off:  # which freezes the values
            torch.testing.assert_close(one.grad, other)
    if happens is merged:
        torch.testing.assert_close(model(IDS), expected(IDS))
        model.unmerge_adapter()
        assert is_base(switched_off(model))


def test_gradients_through_the_base_model_that_is_merged_by_then() -> None:
    base = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model, plain = adapted(copy.deepcopy(base)), base.requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    with model.disable_adapter():
        output = model(x)
    model.merge_adapter()
    (actual,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    torch.testing.assert_close(actual, expected)


def test_moving_averages_over_all_parameters() -> None:
    """As diffusers' EMAModel does it: all are stored, others used, and the stored ones put back."""
    model = adapted()
    model(IDS)
    stored = [p.detach().clone() for p in model.parameters()]
    model.state_dict()
    for parameter, earlier in zip(model.parameters(), stored, strict=True):
        parameter.data.copy_(earlier)
    model(IDS)
    assert is_base(switched_off(model))


@pytest.mark.parametrize("kind", [nn.Parameter, torch.clone])
def test_other_tensors_in_the_place_of_the_parameters(kind: Callable[[Tensor], Tensor]) -> None:
    model, other = adapted(), adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    given = {name: kind(p.detach().clone()) for name, p in other.named_parameters()}
    before = {name: p.detach().clone() for name, p in given.items()}
    expected = other(IDS)
    model(IDS)
    actual = torch.func.functional_call(model, given, (IDS,))
    torch.testing.assert_close(actual, expected)
    assert all(torch.equal(p, before[name]) for name, p in given.items())
    assert is_base(switched_off(model))


def test_scaled_passes_under_hooks_that_copy_what_is_kept() -> None:
    x = torch.randn(3, 6)

    def gradient() -> Tensor:
        torch.manual_seed(0)
        model = adapted(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_()
        y = x.clone().requires_grad_()
        outputs = []
        for scale in (0.5, -0.5):
            for layer in layers(model).values():
                layer.set_scale("default", scale)
            outputs.append(model(y).square())
        (outputs[0] - outputs[1]).sum().backward()
        assert y.grad is not None
        return y.grad

    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda tensor: tensor.clone()):
        hooked = gradient()
    torch.testing.assert_close(hooked, gradient())


@pytest.mark.parametrize("is_on", [True, False])
def test_gradients_of_gradients_beside_another_pass(is_on: bool) -> None:
    model = adapted(nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 2, 1)))
    x = torch.randn(2, 4, 6, requires_grad=True)
    with nullcontext() if is_on else model.disable_adapter():
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (model(x).sum() + g.square().sum()).backward()
    assert x.grad is not None


def test_two_passes_before_their_gradients() -> None:
    model, expected = adapted(), adapted()
    first, second = model(IDS).square().sum(), model(IDS.flip(0)).exp().sum()
    first.backward()
    second.backward()
    expected(IDS).square().sum().backward()
    expected(IDS.flip(0)).exp().sum().backward()
    for one, other in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_through_the_base_model_beside_the_adapter() -> None:
    """A term that pulls on the base model's own output for the same trained input."""
    base = nn.Sequential(*net()[1:])
    model, plain = adapted(copy.deepcopy(base)), copy.deepcopy(base).requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with model.disable_adapter():
        reference = model(x)
    (model(x) - reference).square().sum().backward()
    expected_model = adapted(copy.deepcopy(base))
    (expected_model(y) - plain(y)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_first_run_in_inference_mode() -> None:
    model, expected = adapted(), adapted()
    with torch.inference_mode():
        model(IDS)
    for each in (model, expected):
        for layer in layers(each).values():
            layer.scale_layer(0.5)
        each(IDS).square().sum().backward()
    for one, other in zip(gradients(model), gradients(expected), strict=True):
        assert torch.equal(one, other)
    assert is_base(switched_off(model))


def test_a_forward_pass_takes_no_memory_for_the_weight() -> None:
    base = nn.Sequential(nn.Linear(256, 512, bias=False))
    model = graftune.wrap(base, "sara", fraction=0.1, regularizers=[])
    x = torch.randn(2, 256, requires_grad=True)
    model(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(x)
    largest = max(event.cpu_memory_usage for event in profiled.events())
    assert largest < base[0].base_layer.weight.nbytes / 10


def shared(base: nn.Module) -> nn.Module:
    return base.share_memory()


def channels_last(base: nn.Module) -> nn.Module:
    return base.to(memory_format=torch.channels_last)


def under_inference(base: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(base)


@pytest.mark.parametrize("made", [shared, channels_last, under_inference])
def test_weights_that_are_not_the_layers_own_are_copied(
    made: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    expected = adapted(copy.deepcopy(plain))
    model = adapted(made(copy.deepcopy(plain)))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), expected(x))
    assert torch.equal(layers(model)["0"].base_layer.weight, plain[0].weight)


def test_original_values_are_kept_in_memory_and_survive_pickling() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(512, 512))
    model = adapted(copy.deepcopy(plain))
    x = torch.randn(2, 512)
    expected = model(x)
    assert not torch.equal(layers(model)["0"].base_layer.weight, plain[0].weight)
    (kept,) = layers(model)["0"].own_weight.originals()
    assert kept.device == plain[0].weight.device
    assert not kept.is_shared()  # as a tensor is that a file is mapped to
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), expected)
    assert torch.equal(again.unload()[0].weight, plain[0].weight)

"""SaRA on a model: what is trained, what stays, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import graftune
from graftune import L2ToStart, Regularization, SaraConfig
from graftune.adapters.base.sparse_parts import sparse_parts
from graftune.adapters.base.weights import weight_changes
from graftune.adapters.sara.layer import SaraLayer
from support.models import MODELS
from support.untouched import assert_untouched, snapshot


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 4))


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def magnitudes(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).abs()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"threshold": 0.02}, lambda m: int((m < 0.02).sum())),
        ({"fraction": 0.25}, lambda m: int(0.25 * m.numel())),
        ({"num_parameters": 100}, lambda m: 100),
        ({"threshold": 0.02, "select": "largest"}, lambda m: int((m < 0.02).sum())),
    ],
)
def test_as_many_as_were_asked_for_over_all_tensors(options: Any, count: Any) -> None:
    base = net()
    expected = count(magnitudes(base))
    largest = options.get("select") == "largest"
    model = graftune.wrap(base, "sara", **options)
    # The norm's thirty ones tie: they are taken together or not at all.
    assert expected - 30 * largest <= trained(model) <= expected
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert largest or any(name.endswith(".bias") for name in names)


def test_base_weights_are_never_touched() -> None:
    base = net()
    state = copy.deepcopy(base.state_dict())
    tensors = dict(base.named_parameters())
    model = graftune.wrap(base, "sara", fraction=0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    x = torch.randn(5, 20)
    before = model(x).detach()
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    unloaded = model.unload()
    for name, tensor in unloaded.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert unloaded.get_parameter(name) is tensors[name]


def test_merged_is_exactly_the_values() -> None:
    model = graftune.wrap(net(), "sara", fraction=0.3, init_weights=False)
    x = torch.randn(5, 20)
    expected = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), expected)
    for part in sparse_parts(model):
        layer = model.get_submodule(part.name.split(".sara_values")[0])
        weight = getattr(layer.base_layer, part.name.rpartition(".")[2])
        assert torch.equal(part.entries(weight), part.values)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_adapter("second", SaraConfig(fraction=0.3))
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)


def test_parts_of_a_model() -> None:
    model = graftune.wrap(net(), "sara", fraction=0.3, target_modules=["0"])
    assert all(".0." in part.name for part in sparse_parts(model))
    model = graftune.wrap(net(), "sara", fraction=0.3, target_parameters=["0.weight", "2.bias"])
    names = {part.name.replace("base_model.model.", "") for part in sparse_parts(model)}
    assert names <= {"0.sara_values.default.weight", "2.sara_values.default.bias"}
    assert "0.sara_values.default.weight" in names
    model = graftune.wrap(net(), "sara", fraction=0.3, exclude_modules=["0"])
    assert not any(".0." in part.name for part in sparse_parts(model))


def test_a_parameter_read_from_outside_has_the_values_in_it() -> None:
    model = graftune.wrap(net(), "sara", fraction=0.3, init_weights=False)
    layer = model.base_model.model[0]
    x = torch.randn(2, 20)
    expected = model.base_model.model[0](x)
    actual = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(actual, expected)
    assert layer.weight.requires_grad
    assert layer.in_features == 20
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight


def test_attention_with_packed_weights_and_its_output_projection() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, batch_first=True)})
    model = graftune.wrap(base, "sara", fraction=0.3, target_modules=["attn"], init_weights=False)
    attention = model.base_model.model["attn"]
    assert {part.name.split("attn.")[1] for part in sparse_parts(model)} >= {
        "sara_values.default.in_proj_weight",
        "base_layer.out_proj.sara_values.default.weight",
    }
    x = torch.randn(2, 5, 16)
    expected = attention(x, x, x)[0]
    expected.sum().backward()
    assert all(part.values.grad is not None for part in sparse_parts(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged["attn"](x, x, x)[0], expected)


def test_scales_and_sums_of_adapters() -> None:
    model = graftune.wrap(net(), "sara", fraction=0.3, init_weights=False)
    changes = {name: change().detach() for name, change in weight_changes(model)}
    x = torch.randn(5, 20)
    full = model(x)
    for layer in model.modules():
        if isinstance(layer, SaraLayer):
            layer.scale_layer(0.5)
    for name, change in weight_changes(model):
        torch.testing.assert_close(change().detach(), 0.5 * changes[name])
    assert not torch.allclose(model(x), full)
    for layer in model.modules():
        if isinstance(layer, SaraLayer):
            layer.unscale_layer()
    assert torch.equal(model(x), full)

    graftune.wrap(model, "sara", adapter_name="second", fraction=0.1, init_weights=False)
    model.set_adapter("second")
    other = {name: change().detach() for name, change in weight_changes(model)}
    model.base_model.set_adapter(["default", "second"])
    base = dict(model.get_base_model().named_parameters())
    for name in changes.keys() | other.keys():
        module, _, parameter = name.rpartition(".")
        layer = model.get_base_model().get_submodule(module)
        total = base[f"{module}.base_layer.{parameter}"].detach().clone()
        total += changes.get(name, torch.zeros(())) + other.get(name, torch.zeros(()))
        torch.testing.assert_close(getattr(layer, parameter).detach(), total)


def test_l2_to_start_of_the_merged_weights() -> None:
    model = graftune.wrap(net(), "sara", fraction=0.3)
    regularization = Regularization(model, [L2ToStart(1.0, of="merged")])
    regularization.start(1, 1)
    starts = [part.values.detach().clone() for part in sparse_parts(model)]
    with torch.no_grad():
        for part in sparse_parts(model):
            part.values.add_(0.1)
    outputs = regularization.losses(lambda: {"loss": torch.zeros((), requires_grad=True)})
    count = sum(start.numel() for start in starts)
    assert float(outputs["loss"].detach()) == pytest.approx(0.005 * count, rel=1e-5)
    outputs["loss"].backward()
    for part in sparse_parts(model):
        torch.testing.assert_close(part.values.grad, torch.full_like(part.values, 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"threshold": 1e-12, "target_modules": ["0"]},
            "selects nothing of the 630 targeted",
        ),
        ({"threshold": 1e6}, "selects everything"),
        ({"num_parameters": 10**9}, "selects everything"),
        ({"fraction": 1e-9}, "selects nothing"),
        ({"threshold": 0.1, "fraction": 0.1}, "both say how many"),
        ({"threshold": -1.0}, "`threshold` must be a finite number above 0"),
        ({"threshold": float("inf")}, "`threshold` must be"),
        ({"fraction": 1.0}, "`fraction` must be a number between 0 and 1"),
        ({"num_parameters": 0.5}, "`num_parameters` must be a whole number"),
        ({"select": "median"}, "`select` is one of"),
        ({"cutoff": 0.1}, "no field 'cutoff'"),
        ({"target_modules": ["lin0"]}, "not found in the base model"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    base = net()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        graftune.wrap(base, "sara", **options)
    assert_untouched(base, before)


def tied() -> nn.Module:
    base = net()
    base[2] = nn.Linear(30, 30)
    base.append(nn.Linear(30, 30))
    base[3].weight = base[2].weight
    return base


def with_integers() -> nn.Module:
    base = net()
    codes = torch.ones(4, 30, dtype=torch.int8)
    base[2].weight = nn.Parameter(codes, requires_grad=False)
    return base


def test_weights_that_are_not_in_memory() -> None:
    base = net()
    base[2].to("meta")
    with pytest.raises(ValueError, match="values are not in memory"):
        graftune.wrap(base, "sara", fraction=0.1)
    assert type(base[0]) is nn.Linear


def test_integers_and_quantised_weights() -> None:
    base, message = with_integers(), "'2.weight' in part: its entries are torch.int8, integers or"
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        graftune.wrap(base, "sara", fraction=0.1)
    assert_untouched(base, before)


def test_tied_weights_are_refused_where_named_and_left_out_otherwise() -> None:
    base = tied()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"'2.weight', '3.weight' \(tied"):
        graftune.wrap(base, "sara", fraction=0.1, target_modules=["2"])
    assert_untouched(base, before)
    with pytest.warns(UserWarning, match="leaves out '2.weight', '3.weight'"):
        model = graftune.wrap(base, "sara", fraction=0.3)
    names = {part.name for part in sparse_parts(model)}
    assert not {n for n in names if n.endswith(("2.sara_values.default.weight", "3.weight"))}
    assert model.base_model.model[3].base_layer.weight is model.base_model.model[2].weight


def test_a_tasks_new_head_is_trained_in_full() -> None:
    from transformers import BertConfig, BertForTokenClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForTokenClassification(BertConfig(**sizes, intermediate_size=16, vocab_size=32))
    model = graftune.wrap(base, "sara", fraction=0.2)
    assert not any("classifier" in part.name for part in sparse_parts(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("classifier.modules_to_save.default.weight" in name for name in trained)


def test_scaled_and_accumulated_gradients_are_those_of_one_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 20)
    found = []
    for parts in (1, 4):
        model = graftune.wrap(net(), "sara", fraction=0.3)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            for part in x.chunk(parts):
                scaler.scale(model(part).square().sum() / len(x)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append([part.values.detach().clone() for part in sparse_parts(model)])
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-3, atol=1e-5)


def test_another_methods_layer_is_not_wrapped() -> None:
    model = get_peft_model(net(), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="another method's"):
        graftune.adapters.sara.layer.SaraLayer(
            model.base_model.model[0], "default", SaraConfig(), {}
        )


def test_memory_of_an_entry() -> None:
    """Beside value, gradient and the optimizer's two moments: about one byte for the place."""
    model = graftune.wrap(nn.Sequential(nn.Linear(1000, 1000)), "sara", fraction=0.1)
    (layer,) = (m for m in model.modules() if isinstance(m, SaraLayer))
    places = layer.places["default"]
    count = sum(p.count for p in places.values())
    assert sum(p.nbytes for p in places.values()) <= 1.05 * count
    assert all(buffer.numel() == 0 for buffer in layer.buffers())


@pytest.mark.parametrize("family", ["diffusers-unet", "transformers-llama", "open_clip-vit"])
def test_compiled_without_breaks(family: str) -> None:
    case = MODELS[family]
    torch.compiler.reset()
    model = graftune.wrap(case.build(), "sara", fraction=0.2, init_weights=False)
    expected = case.run(model, case.batch())
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    actual = case.run(compiled, case.batch())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

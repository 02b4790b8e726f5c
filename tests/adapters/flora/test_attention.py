"""Packed attention weights and other parameters that a module uses by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from graftune.adapters.flora import FloraConfig, FloraParameters, Linear


class Block(nn.Module):
    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, **kwargs)
        self.head = nn.Linear(16, 3)

    def forward(self, q, k=None, v=None):
        return self.head(self.attn(q, q if k is None else k, q if v is None else v)[0])


def adapt(model: nn.Module, **config) -> PeftModel:
    config = {"r": 3, "init_weights": False} | config
    return get_peft_model(model, FloraConfig(**config), autocast_adapter_dtype=False)


def with_deltas(base: nn.Module, model: PeftModel, adapter: str = "default") -> nn.Module:
    """A copy of the base model whose weights are W + ΔW, taken from the layers by hand."""
    changed = copy.deepcopy(base)
    for path, layer in model.base_model.model.named_modules():
        name = ".".join(part for part in path.split(".") if part != "base_layer")
        if isinstance(layer, FloraParameters):
            for parameter in layer.adapted_names([adapter]):
                tensor = getattr(changed.get_submodule(name), parameter)
                tensor.data += layer.get_delta_weight(adapter, parameter)
        elif isinstance(layer, Linear):
            changed.get_submodule(name).weight.data += layer.get_delta_weight(adapter)
    return changed


def adapted(model: PeftModel) -> set[str]:
    keys = PeftModel.get_layer_status(model)
    return {status.name.removeprefix("model.") for status in keys}


TARGETS = {
    "module": {"target_modules": ["attn"]},
    "module and out_proj": {"target_modules": ["attn", "out_proj"]},
    "out_proj": {"target_modules": ["out_proj"]},
    "parameter": {"target_parameters": ["in_proj_weight"]},
    "long parameter": {"target_parameters": ["attn.in_proj_weight"]},
    "parameter and out_proj": {
        "target_parameters": ["in_proj_weight"],
        "target_modules": ["out_proj"],
    },
    "both parameters": {"target_parameters": ["in_proj_weight", "out_proj.weight"]},
    "module and parameter": {"target_modules": ["attn"], "target_parameters": ["in_proj_weight"]},
}
COUNT = {"out_proj": 1, "parameter": 1, "long parameter": 1}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_every_way_to_target(targets, batch_first, tmp_path) -> None:
    base = Block(batch_first=batch_first).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = base(x)
    model = adapt(copy.deepcopy(base), **TARGETS[targets])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * COUNT.get(targets, 2)
    expected = with_deltas(base, model)(x)
    assert not torch.allclose(expected, before)

    output = model(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():  # PyTorch's fast path
        torch.testing.assert_close(model(x), expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), before)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for same in (loaded, copied, pickle.loads(pickle.dumps(model))):
            assert torch.equal(same(x), model(x))
    assert all(map(torch.equal, model.unload().state_dict().values(), base.state_dict().values()))
    plain = copied.merge_and_unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(plain(x), expected)


def test_separate_projections() -> None:
    base = Block(kdim=12, vdim=20, batch_first=True).double()
    q, k, v = (torch.randn(2, 5, n, dtype=torch.float64) for n in (16, 12, 20))
    model = adapt(copy.deepcopy(base), target_modules=["attn"])
    assert len([p for p in model.parameters() if p.requires_grad]) == 4 * 3
    torch.testing.assert_close(model(q, k, v), with_deltas(base, model)(q, k, v))


def test_names_in_the_checkpoint(tmp_path) -> None:
    from safetensors.torch import load_file

    adapt(Block(), target_modules=["attn"]).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names == {
        f"base_model.model.attn.{part}{tail}"
        for part in ("flora_core", "flora_factor0", "flora_factor1")
        for tail in (".in_proj_weight",)
    } | {
        f"base_model.model.attn.out_proj.{part}"
        for part in ("flora_core", "flora_factor0", "flora_factor1")
    }


@pytest.mark.parametrize("padded", [True, False])
def test_encoder_layers_with_a_fast_path(padded) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padded else None
    model = adapt(copy.deepcopy(base), target_modules=["self_attn", "linear1", "linear2"])
    changed = with_deltas(base, model)
    visible = slice(None) if mask is None else ~mask
    torch.testing.assert_close(
        model(x, src_key_padding_mask=mask), changed(x, src_key_padding_mask=mask)
    )
    model.eval()
    with torch.no_grad():
        expected = changed(x, src_key_padding_mask=mask)
        assert not torch.allclose(
            base.eval()(x, src_key_padding_mask=mask)[visible], expected[visible]
        )
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[visible], expected[visible])


class Experts(nn.Module):
    """A module that multiplies by stacked weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 12))
        self.down = nn.Parameter(torch.randn(3, 12, 8))
        self.bias = nn.Parameter(torch.randn(8))
        self.experts = 3

    def forward(self, x):
        return torch.einsum("bi,eio,eoj->bj", x, self.up, self.down) + self.bias


def test_stacked_parameters_and_two_adapters_on_different_ones() -> None:
    base = nn.Sequential(Experts()).double()
    x = torch.randn(2, 8, dtype=torch.float64)
    model = adapt(copy.deepcopy(base), target_parameters=["up"], rank_pattern={"0.up": [1, 2, 3]})
    layer = model.base_model.model[0]
    assert layer.r["default"] == {"up": (1, 2, 3)}
    assert layer.get_delta_weight("default").shape == (3, 8, 12)
    first = model(x)
    torch.testing.assert_close(first, with_deltas(base, model)(x))
    model.add_adapter(
        "other", FloraConfig(r=2, target_parameters=["0.down", "up"], init_weights=False)
    )
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    torch.testing.assert_close(model(x), with_deltas(base, model, "other")(x), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="several"):
        layer.get_delta_weight("other")
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    assert not any("other" in name for name in model.state_dict())


def test_attributes_read_through_the_layer() -> None:
    base = nn.Sequential(Experts())
    model = adapt(copy.deepcopy(base), target_parameters=["up"])
    layer = model.base_model.model[0]
    assert layer.experts == 3
    assert layer.bias is layer.base_layer.bias
    assert layer.down is layer.base_layer.down
    torch.testing.assert_close(layer.up, base[0].up + layer.get_delta_weight("default"))
    with model.disable_adapter():
        assert layer.up is layer.base_layer.up
    with pytest.raises(AttributeError):
        layer.nothing  # noqa: B018
    attention = adapt(Block(batch_first=True), target_modules=["attn"]).base_model.model.attn
    assert attention.batch_first
    assert attention.head_dim == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant) -> None:
    base = Block(batch_first=True).double()
    model = adapt(base, target_modules=["attn", "head"])
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).sum(), wanted)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    for parameter, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"target_parameters": ["in_proj_bias"]}, "two axes"),
        ({"target_modules": ["head"], "target_parameters": ["head.weight"]}, "only one of"),
        ({"target_modules": ["attn"], "r": [4, 4, 4]}, "3 ranks for 2 axes"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_changes(config, match) -> None:
    base = Block()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=match):
        adapt(base, **config)
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize("targets", [["attn"], ["out_proj"]])
def test_dropout_that_cannot_act_is_told(targets) -> None:
    base = Block().double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"dropout=0\.1 does not act on 'attn"):
        model = adapt(copy.deepcopy(base), target_modules=targets, dropout=0.1)
    torch.testing.assert_close(model(x), with_deltas(base, model)(x))


def test_weights_laid_over_the_parameters_as_fsdp_does() -> None:
    base = Block().double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    model = adapt(base, target_modules=["attn", "head"], r=8)
    assert not model.base_model.model.head.uses_chain["default"]
    expected = model(x)
    for path, name in (("attn", "in_proj_weight"), ("head", "weight")):
        module = model.base_model.model.get_submodule(path).base_layer
        module.__dict__[name] = getattr(module, name).detach().clone()
    torch.testing.assert_close(model(x), expected)
    module = model.base_model.model.head.base_layer
    assert module.weight is module.__dict__["weight"]

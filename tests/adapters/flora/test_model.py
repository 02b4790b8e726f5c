"""FLoRA as a PEFT method: errors, warnings, mixed batches, sums, compilation, optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftune.adapters.flora import FloraConfig, FloraLayer, FloraModel


class Net(nn.Module):
    """One layer of every kind that takes part in mixed batches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.conv = nn.Conv1d(32, 64, 3, padding=1)
        self.up = nn.ConvTranspose1d(64, 32, 2, stride=2)
        self.fc = nn.Linear(32, 48)

    def forward(self, ids):
        x = self.conv(self.embed(ids).transpose(1, 2))
        return self.fc(self.up(x).transpose(1, 2))


ALL = ["embed", "conv", "up", "fc"]
IDS = torch.arange(18).reshape(3, 6)


def adapt(base: nn.Module, **config) -> PeftModel:
    config = {"r": 3, "target_modules": ALL, "init_weights": False} | config
    return get_peft_model(base, FloraConfig(**config))


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "view" not in str(func) and func not in (
            torch.ops.aten.t.default,
            torch.ops.aten.detach.default,
        ):
            self.seen |= {tuple(x.shape) for x in tree_leaves(result) if torch.is_tensor(x)}
        return result


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(70, 90), torch.randn(5, 70)),
        (nn.Conv2d(70, 90, 3), torch.randn(2, 70, 5, 5)),
        (nn.Conv2d(64, 96, 3, groups=2), torch.randn(2, 64, 5, 5)),
        (nn.ConvTranspose2d(70, 90, 3), torch.randn(2, 70, 5, 5)),
        (nn.Embedding(70, 90), torch.arange(9)),
    ],
)
def test_the_chain_never_builds_the_dense_update(base, x) -> None:
    model = get_peft_model(nn.Sequential(base), FloraConfig(r=4, target_modules=["0"]))
    assert model.base_model.model[0].uses_chain["default"]
    with Shapes() as shapes:
        if x.is_floating_point():
            x = x.clone().requires_grad_()
        model(x).square().sum().backward()
    weight = tuple(base.weight.shape)
    assert weight not in shapes.seen
    assert weight[::-1] not in shapes.seen
    assert (weight[1], weight[0], *weight[2:]) not in shapes.seen


def test_ranks_beyond_a_dimension_and_adapters_beyond_the_weight_are_told_once() -> None:
    base = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.warns(UserWarning, match="cut|numbers") as warned:
        get_peft_model(base, FloraConfig(r=[4, 4, 3, 3], target_modules=["0", "1"]))
    messages = [str(w.message) for w in warned]
    assert len(messages) == 2
    assert "cut" in messages[0]
    assert "'0', '1'" in messages[0]
    assert "as many numbers" in messages[1]
    assert "rank_pattern" in messages[1]


@pytest.mark.parametrize(
    ("base", "config", "error", "match"),
    [
        (nn.Linear(8, 8), {"r": [4, 4, 4]}, ValueError, "rank_pattern"),
        (nn.LayerNorm(8), {}, TypeError, "LayerNorm are not supported"),
        (nn.Bilinear(4, 4, 4), {}, TypeError, "Bilinear"),
        (nn.LazyLinear(4), {}, ValueError, "empty shape"),
    ],
)
def test_unsuited_targets_are_refused_before_anything_changes(base, config, error, match) -> None:
    model = nn.Sequential(nn.Linear(8, 8), base)
    modules = list(model.modules())
    with pytest.raises(error, match=match):
        get_peft_model(model, FloraConfig(target_modules=["0", "1"], **config))
    assert list(model.modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_adapter_shapes_are_those_of_the_checkpoint() -> None:
    base = Net()
    config = FloraConfig(r=3, target_modules=ALL)
    expected = {
        f"{key}.{name}": shape
        for key in ALL
        for name, shape in FloraModel.adapter_shapes(
            config, key, base.get_submodule(key), None
        ).items()
    }
    model = get_peft_model(base, config)
    from peft import get_peft_model_state_dict

    found = {
        key.removeprefix("base_model.model."): tuple(tensor.shape)
        for key, tensor in get_peft_model_state_dict(model).items()
    }
    assert found == expected


def test_mixed_batch_is_each_adapter_on_its_own() -> None:
    model = adapt(Net())
    model.add_adapter("other", FloraConfig(r=2, target_modules=["fc", "conv"], init_weights=False))
    model.eval()
    expected = []
    for row, name in enumerate(("other", "__base__", "default")):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model(IDS[row : row + 1]))
        else:
            model.set_adapter(name)
            expected.append(model(IDS[row : row + 1]))
    output = model(IDS, adapter_names=["other", "__base__", "default"])
    torch.testing.assert_close(output, torch.cat(expected))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_mixed_batches_that_cannot_be_are_refused() -> None:
    model = adapt(Net())
    with pytest.raises(ValueError, match="training mode"):
        model(IDS, adapter_names=["default"] * 3)
    model.eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): defult. Did you mean"):
        model(IDS, adapter_names=["defult"] * 3)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(IDS, adapter_names=["default"])
    with pytest.raises(TypeError, match="list"):
        model(IDS, adapter_names="default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(IDS, adapter_names=["default"] * 3)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    for target in ("attn", "out_proj"):
        model = adapt(Attention(), target_modules=[target]).eval()
        with pytest.raises(ValueError, match="one weight for the whole batch"):
            model(torch.randn(2, 3, 8), adapter_names=["default", "__base__"])


def test_weighted_sum_is_exact_and_can_be_saved(tmp_path) -> None:
    class Both(Net):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(48, 2, batch_first=True)

        def forward(self, ids):
            x = super().forward(ids)
            return self.attn(x, x, x)[0]

    base = Both()
    model = adapt(copy.deepcopy(base), target_modules=[*ALL, "attn"], scale=2.0)
    model.add_adapter(
        "other",
        FloraConfig(
            r=9,
            target_modules=["fc", "conv"],
            target_parameters=["in_proj_weight"],
            rank_pattern={"conv": [5, 4, 2]},
            init_weights=False,
        ),
    )
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -1.5], "sum")
    assert model.active_adapters == ["default"]
    for layer in model.modules():
        if not isinstance(layer, FloraLayer):
            continue
        for name in layer.adapted_names(["sum"]):
            expected = 0.5 * layer._delta("default", name)
            other = layer._delta("other", name)
            expected = expected if other is None else expected - 1.5 * other
            torch.testing.assert_close(layer._delta("sum", name), expected)
    model.set_adapter("sum")
    output = model(IDS)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "sum")
    torch.testing.assert_close(loaded.train()(IDS), output)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((["default"], [1.0], "sum", "svd"), "'cat'"),
        ((["defautl"], [1.0], "sum"), "Did you mean 'default'"),
        ((["default"], [1.0, 2.0], "sum"), "2 weights for 1 adapters"),
        ((["default"], [1.0], "default"), "already"),
    ],
)
def test_sums_that_cannot_be_are_refused(arguments, match) -> None:
    model = adapt(Net())
    with pytest.raises(ValueError, match=match):
        model.base_model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default"]


def test_around_another_method_s_layer() -> None:
    base = nn.Sequential(nn.Linear(32, 32), nn.Conv1d(4, 6, 3))
    x = torch.randn(4, 32)
    config = LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    lora = get_peft_model(base, config).base_model.model
    expected = lora(x)
    model = adapt(lora, target_modules=["0", "1"], r=2)
    inner = model.base_model.model
    assert isinstance(inner[0].base_layer, LoraLayer)
    delta = inner[0].get_delta_weight("default")
    inner[1].flora_core["default"].data.zero_()
    hidden = inner[0](x)
    torch.testing.assert_close(hidden, inner[0].base_layer(x) + x @ delta.T)
    with model.disable_adapter():
        pass
    assert expected.shape == model(x).shape


@pytest.mark.parametrize("name", ["linear", "conv", "dense", "attention"])
def test_compiles_without_graph_breaks(name) -> None:
    base, x = {
        "linear": (nn.Linear(64, 64), torch.randn(3, 64)),
        "conv": (nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), torch.randn(2, 64, 5, 5)),
        "dense": (nn.Conv2d(8, 8, 3, groups=8), torch.randn(2, 8, 5, 5)),
        "attention": (nn.TransformerEncoderLayer(32, 4, 64, 0.0), torch.randn(4, 2, 32)),
    }[name]
    targets = ["self_attn", "linear1"] if name == "attention" else ["0"]
    model = adapt(nn.Sequential(base), target_modules=targets)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), wanted)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad(output.square().sum(), wanted)
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_optimizers_for_lora_do_not_take_our_tensors_for_theirs() -> None:
    model = adapt(Net())
    names = {id(p): n for n, p in model.named_parameters()}
    plus = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {group["lr"] for group in plus.param_groups for _ in group["params"]}
    assert rates == {1e-3}
    assert not any("lora_A" in name or "lora_B" in name for name in names.values())
    # LoRA-FA solves for LoRA's B and takes every "lora" for its own: it must not train ours in
    # silence.
    lorafa = create_lorafa_optimizer(model, r=3, lora_alpha=8, lr=1e-3)
    model(IDS).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError):
        lorafa.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_only_two_axis_linear_layers_claim_to_convert_to_lora() -> None:
    inner = adapt(Net()).base_model.model
    claims = {name: inner.get_submodule(name).supports_lora_conversion() for name in ALL}
    assert claims == {"embed": False, "conv": False, "up": False, "fc": True}

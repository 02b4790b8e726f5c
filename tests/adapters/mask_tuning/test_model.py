"""What is mask tuning's own as a PEFT method: its layers, its errors, its two kinds of files."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import graftune
from graftune.adapters import mask_tuning
from graftune.adapters.base import messages
from graftune.adapters.base.checkpoint import AdapterMismatchError, training_checkpoint
from graftune.adapters.base.weights import weight_changes
from graftune.adapters.mask_tuning import MaskTuningConfig, MaskTuningLayer
from graftune.adapters.mask_tuning import layer as layer_file
from support.models import MODELS, loss


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(messages, "_warned", set())


def adapt(module: nn.Module, **config: Any) -> tuple[PeftModel, MaskTuningLayer]:
    config = {"target_modules": ["0"], "init_weights": False} | config
    model = get_peft_model(nn.Sequential(module), MaskTuningConfig(**config))
    return model, model.base_model.model[0]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def mask_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


CONVOLUTIONS = {
    "grouped": (nn.Conv2d(8, 16, 3, groups=4, stride=2, bias=False), (2, 8, 9, 9)),
    "reflecting": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", dilation=2), (2, 4, 9)),
    "cubic": (nn.Conv3d(2, 4, (1, 2, 3)), (2, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2), (2, 4, 5, 5)),
    "transposed to a size": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "linear": (nn.Linear(6, 5), (3, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_is_the_base_layer_with_the_masked_weight(name: str) -> None:
    base, shape = CONVOLUTIONS[name]
    base = copy.deepcopy(base).double()
    reference = copy.deepcopy(base)
    model, layer = adapt(base)
    x = torch.randn(shape, dtype=torch.float64)
    mask = layer.mask("default", "weight")
    assert 0 < float(mask.double().mean()) < 1
    weight = nn.Parameter(reference.weight.detach() * mask)
    reference.weight = weight
    expected = reference(x)
    result = model(x)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    expected.square().sum().backward()
    result.square().sum().backward()
    scores = layer.scores("default", "weight")[0]
    original = base.weight.detach()
    assert scores.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(scores.grad, weight.grad * original, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_attention_masks_its_projections(packed: bool) -> None:
    sizes = {} if packed else {"kdim": 6, "vdim": 5}
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes).double()
    reference = copy.deepcopy(attention)
    model = get_peft_model(
        nn.ModuleDict({"attn": attention}),
        MaskTuningConfig(target_modules=["attn"], init_weights=False),
    )
    query = torch.randn(2, 3, 8).double()
    key, value = (query, query) if packed else (torch.randn(2, 4, 6), torch.randn(2, 4, 5))
    inputs = (query, key.double(), value.double())
    layer = model.base_model.model["attn"]
    with torch.no_grad():
        for name in layer.adapted_names(["default"]):
            getattr(reference, name).mul_(layer.mask("default", name))
        reference.out_proj.weight.mul_(layer.out_proj.mask("default", "weight"))
    assert len(list(model.parameters())) == len(list(reference.parameters())) + (2 if packed else 4)
    torch.testing.assert_close(layer(*inputs)[0], reference(*inputs)[0], rtol=1e-9, atol=1e-12)


def test_several_adapters_keep_what_all_of_them_keep() -> None:
    model, layer = adapt(nn.Linear(6, 5))
    model.add_adapter("other", MaskTuningConfig(target_modules=["0"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    both = layer.mask("default", "weight") & layer.mask("other", "weight")
    assert not torch.equal(both, layer.mask("default", "weight"))
    x = torch.randn(3, 6)
    base = layer.get_base_layer()
    expected = F.linear(x, base.weight * both, base.bias)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    weight = base.weight.detach().clone()
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(base.weight, weight * both, rtol=0, atol=0)
    model.unmerge_adapter()
    assert torch.equal(base.weight, weight)
    with pytest.raises(ValueError, match="masks do not add up"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")


def test_unmerging_restores_every_bit() -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[0] = torch.tensor([-0.0, 1e-40, 3.0, -1.5])
    before = linear.weight.detach().clone().view(torch.int32)
    model, layer = adapt(linear)
    with torch.no_grad():
        layer.scores("default", "weight")[0][0] = 0
    model.merge_adapter()
    assert not linear.weight[0].any()
    assert model.peft_config["default"].base_digest == mask_digest(model)
    model.unmerge_adapter()
    assert torch.equal(linear.weight.view(torch.int32), before)


def mask_digest(model: PeftModel) -> str | None:
    from graftune.adapters.base.tuner import digest_of_targets

    return digest_of_targets(model, "default")


def test_any_parameter_by_its_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.table = nn.Parameter(torch.randn(3, 4, 2))
            self.inner.forward = lambda x: torch.einsum("bi,oij->boj", x, self.inner.table)  # type: ignore[method-assign]
            self.embedding = nn.Embedding(5, 4)

        def forward(self, ids: Tensor) -> Tensor:
            rows = self.embedding(ids)
            return torch.einsum("bi,oij->boj", rows, self.embedding.weight[:3, :, None])

    model = get_peft_model(
        Own(), MaskTuningConfig(target_parameters=["embedding.weight"], init_weights=False)
    )
    layer = model.base_model.model.embedding
    mask = layer.mask("default", "weight")
    weight = layer.get_base_layer().weight * mask
    ids = torch.tensor([0, 4])
    expected = torch.einsum("bi,oij->boj", weight[ids], weight[:3, :, None])
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)


def test_changes_of_weights_are_what_merging_changes() -> None:
    model, layer = adapt(nn.Linear(6, 5))
    ((name, change),) = weight_changes(model)
    assert name == "0.weight"
    before = layer.get_base_layer().weight.detach().clone()
    delta = change()
    delta.sum().backward()
    assert layer.scores("default", "weight")[0].grad is not None
    model.merge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before + delta)


# Memory.


@pytest.mark.parametrize("fraction", [None, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_keeps_no_masked_weight(
    monkeypatch: pytest.MonkeyPatch, fraction: float | None, autocast: bool
) -> None:
    made: list[StorageWeakRef] = []
    original = layer_file.masked_weight

    def noted(*args: Any) -> Tensor:
        weight = original(*args)
        made.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(layer_file, "masked_weight", noted)
    gradients, alive = [], []
    x = torch.randn(3, 8)
    for recompute in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            mlp(),
            MaskTuningConfig(target_modules=["0", "2"], fraction=fraction, recompute=recompute),
        )
        if fraction is not None:
            mask_tuning.select(model, [x], mask_loss)
        made.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = model(x)
        alive.append(sum(not storage.expired() for storage in made))
        result.float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        # Twice for a layer that runs again, without the product itself.
        assert len(made) == (4 if recompute else 2)
    assert alive[1] == 0
    if not autocast:
        assert alive[0] > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# A share of the weights.


def test_a_masked_weight_is_kept_in_evaluation_until_something_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, layer = adapt(nn.Linear(6, 5), init_weights=False)
    computed: list[str] = []
    effective = layer.effective

    def counted(name: str, adapters: Any) -> Tensor:
        computed.append(name)
        return effective(name, adapters)

    monkeypatch.setattr(layer, "effective", counted)
    x = torch.randn(2, 6)
    scores: Any = layer.mask_tuning_scores["default"]["weight"]  # type: ignore[index]

    def changes() -> int:
        """How often the weight was masked for two calls, which give what the layer computes."""
        computed.clear()
        with torch.no_grad():
            outputs = [model(x), model(x)]
        mask = scores > layer.threshold["default"]
        base = layer.get_base_layer()
        expected = F.linear(x, base.weight * mask, base.bias)
        assert all(torch.equal(output, expected) for output in outputs)
        return len(computed)

    model.eval()
    assert [changes(), changes()] == [1, 0]
    with torch.no_grad():
        scores.neg_().add_(0.01)
    assert changes() == 1
    layer.set_scores("default", "weight", torch.rand(5, 6) * 0.01)
    assert changes() == 1
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(2)
    assert changes() == 1
    model(x).sum().backward()  # with gradients nothing is kept
    assert not layer._evaluated
    model.train()
    assert changes() == 2
    model.eval()
    layer.recompute["default"] = True
    assert changes() == 2


def test_importance_is_the_gradient_of_the_scores() -> None:
    base, batches = mlp(), [torch.randn(3, 8) for _ in range(3)]
    whole = get_peft_model(copy.deepcopy(base), MaskTuningConfig(target_modules=["0"]))
    expected = torch.zeros(16, 8)
    scores = whole.base_model.model[0].scores("default", "weight")[0]
    for batch in batches:
        whole.zero_grad()
        mask_loss(whole, batch).backward()
        assert scores.grad is not None
        expected += scores.grad.abs()
    some = get_peft_model(base, MaskTuningConfig(target_modules=["0"], fraction=0.1))
    mask_tuning.select(some, batches, mask_loss)
    layer = some.base_model.model[0]
    scores, index = layer.scores("default", "weight")
    assert index is not None
    assert index.dtype == torch.int32
    assert scores.shape == index.shape == (13,)
    chosen = expected.flatten()[index.long()]
    rest = expected.flatten().index_fill(0, index.long(), 0)
    assert chosen.min() >= rest.max()
    assert not any(p.requires_grad for n, p in some.named_parameters() if "mask_tuning" not in n)
    assert all(p.grad is None for p in some.parameters())


def test_most_important_takes_equal_values_in_order() -> None:
    values = torch.tensor([[1.0, 2.0], [2.0, 2.0]])
    assert mask_tuning.most_important(values, 2).tolist() == [1, 2]
    assert mask_tuning.most_important(values, 2, torch.tensor([0])).tolist() == [0, 1]


def test_a_pending_selection_stops_training_saving_and_merging(tmp_path: Path) -> None:
    base, x = mlp(), torch.randn(3, 8)
    expected = base(x)
    model = get_peft_model(base, MaskTuningConfig(target_modules=["0"], fraction=0.1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="selection, which is pending"):
        model(x)
    with pytest.raises(ValueError, match="selection, which is pending"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="selection, which is pending"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="at least one"):
        mask_tuning.select(model, [], mask_loss)
    with pytest.raises(ValueError, match=r"no gradient of the loss reaches .*0\.weight"):
        mask_tuning.select(model, [x], lambda model, x: model(x).sum() * 0)
    assert mask_tuning.is_pending(model, "default")
    mask_tuning.select(model, [x], mask_loss)
    assert not mask_tuning.is_pending(model, "default")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="nothing to select"):
        mask_tuning.select(adapt(nn.Linear(2, 2))[0], [x], mask_loss)


def test_a_share_is_saved_loaded_and_selected_anew(tmp_path: Path) -> None:
    base, x = mlp(), torch.randn(3, 8)
    model = get_peft_model(
        copy.deepcopy(base), MaskTuningConfig(target_modules=["0", "2"], fraction=0.25)
    )
    mask_tuning.select(model, [x], mask_loss)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.scores("default", "weight")[0][::3] = 0
    mask = layer.mask("default", "weight")
    assert not mask.all()
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = graftune.load(base, tmp_path, is_trainable=True)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    mask_tuning.select(loaded, [torch.randn(3, 8)], mask_loss)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    assert torch.equal(loaded.base_model.model[0].mask("default", "weight"), mask)


# Files.


def test_a_file_holds_bits_and_a_training_checkpoint_scores(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), MaskTuningConfig(target_modules=["0", "2"], init_weights=False))
    model.save_pretrained(tmp_path / "bits")
    with training_checkpoint():
        model.save_pretrained(tmp_path / "scores")
    bits, scores = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("bits", "scores")
    )
    assert {tensor.dtype for tensor in bits.values()} == {torch.uint8}
    assert all(".mask_tuning_bits." in name for name in bits)
    assert {tensor.dtype for tensor in scores.values()} == {torch.float32}
    model.load_adapter(str(tmp_path / "scores"), "again", is_trainable=True)
    with pytest.warns(UserWarning, match="the file holds masks and no scores"):
        model.load_adapter(str(tmp_path / "bits"), "signs", is_trainable=True)
    for index in ("0", "2"):
        layer = model.base_model.model.get_submodule(index)
        own, again, signs = (
            layer.scores(adapter, "weight")[0] for adapter in ("default", "again", "signs")
        )
        assert torch.equal(own, again)
        assert torch.equal(own > 0.005, signs > 0.005)
        assert signs.unique().tolist() == pytest.approx([0.0, 0.01])


def test_the_largest_file_has_a_bit_a_weight(tmp_path: Path) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(600, 500), nn.Linear(500, 300)),
        MaskTuningConfig(target_modules=["0", "1"]),
    )
    weights = 600 * 500 + 500 * 300
    sizes = {}
    for share in (0.5, 0.0256):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "mask_tuning" in name:
                    p.copy_(torch.where(torch.rand_like(p) < share, 0, 0.01))
        model.save_pretrained(tmp_path)
        sizes[share] = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert sizes[0.5] <= weights / 8 + 4096
    entropy = -sum(p * math.log2(p) for p in (0.0256, 1 - 0.0256)) * weights / 8
    assert sizes[0.0256] <= 1.1 * entropy + 1024


def test_another_shape_a_damaged_mask_and_too_many_zeros_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), MaskTuningConfig(target_modules=["0"], init_weights=False))
    state = get_peft_model_state_dict(model)
    ((name, data),) = state.items()
    from peft import set_peft_model_state_dict

    other = get_peft_model(nn.Sequential(nn.Linear(8, 15)), MaskTuningConfig(target_modules=["0"]))
    with pytest.raises(AdapterMismatchError, match=r"\(16, 8\), and the model's has \(15, 8\)"):
        set_peft_model_state_dict(other, state)
    with pytest.raises(AdapterMismatchError, match="damaged"):
        set_peft_model_state_dict(model, {name: data.clone().index_fill_(0, torch.tensor(9), 7)})
    few = get_peft_model(mlp(), MaskTuningConfig(target_modules=["0"], fraction=0.01))
    with pytest.raises(AdapterMismatchError, match="the config belongs to another file"):
        set_peft_model_state_dict(few, state)
    with pytest.raises(AdapterMismatchError, match="missing"):
        set_peft_model_state_dict(model, {"base_model.model.x.mask_tuning_bits.weight": data})


def test_released_masks_go_in_and_out() -> None:
    model = MODELS["open_clip-vit"].build()
    wrapped = graftune.wrap(model, "mask_tuning", init_weights=False)
    masks = mask_tuning.export_released(wrapped)
    assert "visual.conv1.mask_real" in masks
    assert "visual.transformer.resblocks.0.attn.in_proj_weight.mask_real" in masks
    case = MODELS["open_clip-vit"]
    expected = case.run(wrapped, case.batch())
    other = graftune.wrap(case.build(), "mask_tuning")
    mask_tuning.import_released(other, masks)
    assert torch.equal(case.run(other, case.batch()), expected)
    with pytest.raises(AdapterMismatchError, match="1 missing"):
        mask_tuning.import_released(other, {n: m for n, m in list(masks.items())[1:]})


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.01}, "everything would be masked at the start"),
        ({"init": math.nan}, "`init` must be a finite number"),
        ({"threshold": "0"}, "`threshold` must be a finite number"),
        ({"fraction": 1.0}, "between 0 and 1"),
        ({"target_modules": "a.*", "layers_to_transform": 1}, "cannot be used"),
        ({"target_modules": ["a"], "layers_pattern": "h"}, "must also be specified"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskTuningConfig(**settings)


def test_targets_need_graftune_s_wrap() -> None:
    with pytest.raises(ValueError, match=r"graftune\.wrap"):
        get_peft_model(mlp(), MaskTuningConfig(targets="attention"))


class Quantised(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        (Quantised(), {"target_modules": ["0"]}, "of type torch.int8"),
        (parametrised(), {"target_modules": ["0"]}, "parametrization of its own"),
        (nn.LayerNorm(4), {"target_modules": ["0"]}, "target_parameters"),
        (nn.Embedding(4, 4), {"target_modules": ["0"]}, "target_parameters"),
        (
            nn.Linear(4, 4),
            {"target_modules": ["0"], "target_parameters": ["0.weight"]},
            "claimed by two targets",
        ),
        (
            nn.MultiheadAttention(4, 2),
            {"target_modules": ["0"], "target_parameters": ["0.in_proj_weight"]},
            "claimed by two targets",
        ),
        (
            nn.MultiheadAttention(4, 2),
            {"target_modules": ["0"], "target_parameters": ["out_proj.weight"]},
            "claimed by two targets",
        ),
        (
            nn.Linear(4, 4),
            {"target_parameters": ["0.nothing"]},
            "No `target_modules` passed",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused(
    module: nn.Module, config: dict[str, Any], message: str
) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(module))
    config = {
        key: [name.replace("0", "1.0", 1) if name.startswith("0") else name for name in names]
        for key, names in config.items()
    }
    before = [(name, type(child)) for name, child in base.named_modules()]
    grads = [p.requires_grad for p in base.parameters()]
    with pytest.raises((ValueError, TypeError), match=message):
        graftune.wrap(base, MaskTuningConfig(**config))
    assert [(name, type(child)) for name, child in base.named_modules()] == before
    assert [p.requires_grad for p in base.parameters()] == grads


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.wte(ids))


def test_a_tied_weight_is_masked_once_and_that_is_said(tmp_path: Path) -> None:
    base, ids = Tied(), torch.tensor([0, 3])
    config = MaskTuningConfig(
        target_modules=["lm_head"], target_parameters=["wte.weight"], init_weights=False
    )
    with pytest.warns(UserWarning, match=r"masked once.*lm_head.weight = wte.weight"):
        model = get_peft_model(copy.deepcopy(base), config)
    assert sum(p.requires_grad for p in model.parameters()) == 1
    mask = model.base_model.model.wte.mask("default", "weight")
    weight = base.wte.weight * mask
    expected = weight[ids] @ weight.T
    torch.testing.assert_close(model(ids), expected)
    expected = model(ids).detach()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = graftune.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(ids), expected)
    model.merge_adapter()
    assert torch.equal(model(ids), expected)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.wte.get_base_layer().weight, base.wte.weight)


def test_scores_that_are_nan_are_neither_saved_nor_merged(tmp_path: Path) -> None:
    base = mlp()
    model = get_peft_model(base, MaskTuningConfig(target_modules=["0", "2"], init_weights=False))
    before = base[0].get_base_layer().weight.detach().clone()
    with torch.no_grad():
        model.base_model.model[2].scores("default", "weight")[0][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 scores .* are NaN .*nothing was written"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter()
    assert torch.equal(base[0].get_base_layer().weight, before)


def test_a_mask_has_no_scale() -> None:
    _, layer = adapt(nn.Linear(2, 2))
    layer.set_scale("default", 1.0)
    layer.scale_layer(1.0)
    layer.unscale_layer()
    with pytest.raises(ValueError, match=r"a mask has no scale, got 0\.5"):
        layer.scale_layer(0.5)


def test_around_and_inside_another_method_s_layer() -> None:
    from peft import LoraConfig

    case = MODELS["transformers-gpt2"]
    inner = get_peft_model(
        case.build(), LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    )
    with_lora = case.run(inner, case.batch())
    both = get_peft_model(
        inner.base_model.model, MaskTuningConfig(target_modules=["c_attn"], init_weights=False)
    )
    result = case.run(both, case.batch())
    assert not torch.equal(result, with_lora)
    loss(result).backward()
    assert all(p.grad is not None for n, p in both.named_parameters() if "mask_tuning" in n)
    for layer in both.modules():
        if isinstance(layer, MaskTuningLayer):
            layer.enable_adapters(False)
    assert torch.equal(case.run(both, case.batch()), with_lora)

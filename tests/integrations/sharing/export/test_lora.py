"""An exported LoRA is a plain PEFT LoRA: exact where it can be, the nearest one where asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import graftune
from graftune.integrations.sharing.export import export_lora, lora_slots
from support.exports import assert_same, distances_without_graftune, flora, output
from support.models import MODELS
from support.untouched import assert_untouched, snapshot

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
# open_clip's attention without its output projection: see test_attention.
IN_PROJ = {
    "target_modules": ["c_fc", "c_proj"],
    "target_parameters": ["attn.in_proj_weight"],
}
# Ranks and scales that differ from layer to layer and from axis to axis.
UNEQUAL: dict[str, dict[str, Any]] = {
    "transformers-clip": {
        "rank_pattern": {"q_proj": [2, 5], "vision_model.*fc1": [5, 2]},
        "scale_pattern": {"text_model.*": 0.5},
    },
    "transformers-llama": {"rank_pattern": {"down_proj": [4, 2]}, "scale": 2.0},
    "transformers-gpt2": {
        "target_modules": ["c_attn", "c_fc", "wte"],
        "rank_pattern": {"c_attn": [5, 2], "wte": [2, 4]},
    },
    "open_clip-vit": {**IN_PROJ, "rank_pattern": {"in_proj_weight": [6, 2]}},
    "timm-convnext": {"target_modules": "stem.0|.*fc1|.*downsample.1", "scale": 4.0},
    "diffusers-unet": {"rank_pattern": {"conv1": [5, 3, 2, 1], "conv2": [4, 1, 1, 1]}},
}


def test_plain_peft_loads_it_in_a_process_without_graftune(tmp_path: Path) -> None:
    for family, options in UNEQUAL.items():
        case = MODELS[family]
        model = flora(case, **options)
        report = export_lora(model, tmp_path / family)
        assert report.exact
        assert report.error == 0
        assert [file.name for file in report.files] == FILES
        assert report.bytes == sum(file.stat().st_size for file in (tmp_path / family).iterdir())
        save_file({"output": output(case, model).contiguous()}, tmp_path / f"{family}.safetensors")
    distances = distances_without_graftune(tmp_path, list(UNEQUAL))
    assert distances.keys() == UNEQUAL.keys()
    assert max(distances.values()) < 1e-5, distances


@pytest.mark.parametrize("family", [*UNEQUAL, "transformers-bert", "timm-vit", "diffusers-dit"])
def test_it_is_exact_in_float64(family: str, tmp_path: Path) -> None:
    case = MODELS[family]
    model = flora(case, torch.float64, **UNEQUAL.get(family, {}))
    before = snapshot(model)
    assert export_lora(model, tmp_path).exact
    assert_untouched(model, before)
    loaded = peft.PeftModel.from_pretrained(case.build().double(), str(tmp_path))
    assert_same(case, loaded, model, 1e-12)


def test_a_linear_layer_is_the_lora_of_the_papers_letters(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 5))
    model = graftune.wrap(base, "flora", r=2, scale=3.0, init_weights=False)
    report = export_lora(model, tmp_path)
    layer: Any = model.base_model.model[0]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    core, out, inner = (getattr(layer, name)["default"] for name in layer.adapter_layer_names)
    torch.testing.assert_close(tensors["base_model.model.0.lora_B.weight"], 3 * out @ core)
    torch.testing.assert_close(tensors["base_model.model.0.lora_A.weight"], inner.T)
    assert report.tensors == 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert config["target_modules"] == ["0"]


class Stack(nn.Module):
    """Matrices that are used by themselves, and a layer beside them."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.table = nn.Parameter(torch.randn(6, 4))
        self.inner = nn.Linear(4, 4)
        if is_transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(self.inner(x) @ self.experts).sum(0), x @ self.table.T], dim=-1)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.abs().mul(3).long().clamp(max=6))


def conv(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Sequential]:
    return lambda: nn.Sequential(kind(*args, **kwargs), nn.Tanh())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "conv1d": (conv(nn.Conv1d, 4, 6, 3, stride=2, padding=1), (2, 4, 9), {"r": [3, 2, 2]}),
    "conv2d": (conv(nn.Conv2d, 4, 6, (3, 5), padding="same"), (2, 4, 8, 8), {"r": [5, 1, 1, 2]}),
    "conv3d": (conv(nn.Conv3d, 2, 5, 3, padding=(1, 0, 2)), (2, 2, 5, 5, 5), {"r": 2}),
    "pointwise": (conv(nn.Conv2d, 4, 6, 1), (2, 4, 3, 3), {"r": [2, 3, 1, 1]}),
    "embedding": (Embedded, (2, 5), {"target_modules": ["table"], "r": [2, 3]}),
    "parameters": (
        lambda: nn.Sequential(Stack(False), nn.Tanh()),
        (2, 4),
        {"target_modules": ["inner"], "target_parameters": ["0.experts", "0.table"], "r": [2, 3]}
        | {"rank_pattern": {"experts": [2, 3, 2]}},
    ),
    "transposed-parameters": (
        lambda: nn.Sequential(Stack(True), nn.Tanh()),
        (2, 4),
        {"target_parameters": ["0.experts"], "r": [2, 2, 3]},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str, tmp_path: Path) -> None:
    make, shape, options = LAYERS[name]
    torch.manual_seed(0)
    base = make().double()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    x = torch.randn(shape, dtype=torch.float64)
    model = graftune.wrap(base, "flora", init_weights=False, scale=1.5, **options)
    expected = model(x)
    report = export_lora(model, tmp_path)
    assert report.exact
    fresh = make().double()
    fresh.load_state_dict(state)
    unadapted = fresh(x)
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path))
    assert (expected - unadapted).abs().max() > 0.01
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolutions_share_the_rank_out(groups: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups)).double()
    fresh = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups)).double()
    fresh.load_state_dict(base.state_dict())
    model = graftune.wrap(base, "flora", r=2, init_weights=False, target_modules=["0"])
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"is not a LoRA on .0\.weight."):
        export_lora(model, tmp_path)
    with pytest.raises(ValueError, match=f"needs a rank of at least {groups}"):
        export_lora(model, tmp_path, rank=groups - 1)
    assert export_lora(model, tmp_path, rank=2 * groups + 1).exact
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-12)


def test_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21 adds the output projection's LoRA twice: a file right for it would be wrong."""
    case = MODELS["open_clip-vit"]
    model = flora(case, torch.float64)
    twice = lora_slots.adds_output_projection_twice()
    if twice:
        with pytest.raises(ValueError, match=r"output projection twice .*out_proj\.weight"):
            export_lora(model, tmp_path)
        monkeypatch.setattr(lora_slots, "adds_output_projection_twice", lambda: False)
    assert export_lora(model, tmp_path).exact
    loaded = peft.PeftModel.from_pretrained(case.build().double(), str(tmp_path))
    if twice:
        for module in list(loaded.modules()):
            if isinstance(module, peft.tuners.lora.layer.MultiheadAttention):
                module.base_layer.out_proj.lora_B["default"].weight.data.div_(2)
    assert_same(case, loaded, model, 1e-12)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (conv(nn.ConvTranspose2d, 3, 4, 3), r"transposed convolutions \('0.weight'\)"),
        (conv(nn.Conv2d, 3, 4, 3, dilation=2), "no dilation"),
        (conv(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="circular"), "pads with zeros only"),
        (conv(Standardised, 3, 4, 3), "Standardised computes in a way of its own"),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)), "fused inference"),
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4)), "of one width"),
    ],
)
def test_what_peft_has_no_lora_for_is_named(
    make: Callable[[], nn.Sequential], reason: str, tmp_path: Path
) -> None:
    base = make()
    targets = None if isinstance(base[0], nn.TransformerEncoderLayer) else ["0"]
    model = graftune.wrap(base, "flora", r=2, init_weights=False, target_modules=targets)
    for rank in (None, 2):
        with pytest.raises(ValueError, match=reason):
            export_lora(model, tmp_path / "lora", rank=rank)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_the_nearest_lora_of_a_rank_has_the_error_it_says(rank: int, tmp_path: Path) -> None:
    case = MODELS["transformers-llama"]
    config = peft.LoHaConfig(
        r=2, alpha=64, target_modules=["q_proj", "down_proj"], init_weights=False
    )
    model = peft.get_peft_model(case.build(), config).requires_grad_(False)
    with pytest.raises(ValueError, match=r"\(LOHA\) is not a LoRA on .*give `rank=`"):
        export_lora(model, tmp_path)
    assert not any(tmp_path.iterdir())
    report = export_lora(model, tmp_path, rank=rank)
    loaded = peft.PeftModel.from_pretrained(case.build(), str(tmp_path))
    squared_error = squared_norm = 0.0
    for name, error in report.errors.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        delta = model.get_submodule(path).get_delta_weight("default").double()
        nearest = loaded.get_submodule(path).get_delta_weight("default").double()
        assert error == pytest.approx(float((nearest - delta).norm() / delta.norm()), abs=1e-6)
        squared_error += float((nearest - delta).square().sum())
        squared_norm += float(delta.square().sum())
    assert report.error == pytest.approx((squared_error / squared_norm) ** 0.5, abs=1e-6)
    assert report.exact == (rank == 16)
    if rank == 16:
        assert_same(case, loaded, model, 1e-5)


def test_a_rank_cuts_only_what_has_more(tmp_path: Path) -> None:
    model = flora(
        MODELS["transformers-llama"],
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"k_proj": 1},
    )
    report = export_lora(model, tmp_path, rank=2)
    for name, error in report.errors.items():
        assert (error == 0) == ("k_proj" in name)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {name: min(t.shape) for name, t in tensors.items()}
    assert {rank for name, rank in ranks.items() if "q_proj" in name} == {2}
    assert {rank for name, rank in ranks.items() if "k_proj" in name} == {1}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_peft_methods_become_plain_loras(options: dict[str, bool], tmp_path: Path) -> None:
    case = MODELS["transformers-gpt2"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        init_lora_weights=False,
        **options,
    )
    model = peft.get_peft_model(case.build(), config).eval()
    report = export_lora(model, tmp_path, rank=96 if "use_dora" in options else None)
    assert report.exact
    assert_same(case, peft.PeftModel.from_pretrained(case.build(), str(tmp_path)), model, 1e-5)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_modules_trained_in_full_come_along(tmp_path: Path) -> None:
    case = MODELS["transformers-vit"]
    model = flora(case, modules_to_save=["classifier"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(case.build(), str(tmp_path))
    assert_same(case, loaded, model, 1e-5)


def test_one_adapter_of_several_as_it_is_scaled_now(tmp_path: Path) -> None:
    case = MODELS["timm-vit"]
    model = flora(case)
    graftune.wrap(model, "flora", adapter_name="other", r=2, init_weights=False)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("other", 2.0)
    assert model.active_adapters == ["default"]
    export_lora(model, tmp_path, adapter_name="other")
    model.set_adapter("other")
    assert_same(case, peft.PeftModel.from_pretrained(case.build(), str(tmp_path)), model, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_model_may_be_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    case = MODELS["transformers-vit"]
    model = flora(case, dtype)
    assert export_lora(model, tmp_path).exact
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    loaded = peft.PeftModel.from_pretrained(case.build().to(dtype), str(tmp_path))
    assert_same(case, loaded, model, 0.05)


def test_names_that_end_like_others_are_told_apart(tmp_path: Path) -> None:
    def make() -> nn.Module:
        inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        return nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 4))

    base, fresh = make(), make()
    fresh.load_state_dict(base.state_dict())
    options = {"target_modules": "^[02]$", "rank_pattern": {"^0": 1}}
    model = graftune.wrap(base, "flora", r=2, init_weights=False, **options)
    export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path))
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x))


def test_diffusers_loads_it_by_the_lines_of_the_card(tmp_path: Path) -> None:
    case = MODELS["diffusers-unet"]
    model = flora(case, **UNEQUAL["diffusers-unet"])
    export_lora(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    unet = case.build()
    exec(code.replace("path/to/this/folder", str(tmp_path)), {"model": unet})
    assert_same(case, unet, model, 1e-5)


def test_pefts_own_conversion_takes_linear_layers(tmp_path: Path) -> None:
    case = MODELS["transformers-llama"]
    model = flora(case)
    assert model.supports_lora_conversion()
    peft.save_as_lora(str(tmp_path), model, rank=3)
    assert_same(case, peft.PeftModel.from_pretrained(case.build(), str(tmp_path)), model, 1e-4)
    for family in ("open_clip-vit", "torch-transformer", "torch-cnn"):
        assert not flora(MODELS[family]).supports_lora_conversion()


def prompts() -> peft.PeftModel:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.get_peft_model(MODELS["transformers-llama"].build(), config)


def deep_prompts() -> peft.PeftModel:
    depths = {"depth_text": 2, "depth_vision": 2}
    return graftune.wrap(MODELS["transformers-clip"].build(), "promptsrc", init_text=None, **depths)


def tokens() -> peft.PeftModel:
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
    return peft.get_peft_model(MODELS["transformers-llama"].build(), config)


def biases() -> peft.PeftModel:
    config = peft.LoraConfig(target_modules=["query"], bias="lora_only")
    return peft.get_peft_model(MODELS["transformers-bert"].build(), config)


def two_methods() -> peft.PeftModel:
    inner = peft.get_peft_model(MODELS["timm-vit"].build(), peft.LoraConfig(target_modules=["qkv"]))
    config = graftune.FloraConfig(target_modules=["qkv"], r=2)
    return peft.get_peft_model(inner.base_model.model, config)


def merged() -> peft.PeftModel:
    model = flora(MODELS["timm-vit"])
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MODELS["timm-vit"].build(), TypeError, "as graftune.wrap"),
        (prompts, ValueError, "PROMPT_TUNING.* consists of prompts"),
        (deep_prompts, ValueError, "consists of prompts"),
        (tokens, ValueError, "trained tokens"),
        (biases, ValueError, "bias='lora_only'"),
        (two_methods, ValueError, "several methods' layers"),
        (merged, ValueError, "unmerge_adapter"),
    ],
)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT")
def test_what_cannot_be_exported_at_all(
    make: Callable[[], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_lora(make(), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_adapters_own_folder_is_not_overwritten(tmp_path: Path) -> None:
    model = flora(MODELS["timm-vit"])
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="an adapter of the method FLORA"):
        export_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    export_lora(model, tmp_path / "lora")
    export_lora(model, tmp_path / "lora")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = flora(MODELS["timm-vit"])
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        export_lora(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_layer_used_in_two_places_counts_once(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    model = graftune.wrap(
        nn.Sequential(shared, nn.Tanh(), shared), "flora", r=1, init_weights=False
    )
    assert export_lora(model, tmp_path).tensors == 2
    fresh = nn.Linear(4, 4)
    fresh.load_state_dict(shared.state_dict())
    base = nn.Sequential(fresh, nn.Tanh(), fresh)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded(x), model(x))


def test_arguments_are_checked(tmp_path: Path) -> None:
    model = flora(MODELS["timm-vit"])
    with pytest.raises(ValueError, match="Did you mean 'default'"):
        export_lora(model, tmp_path, adapter_name="defaut")
    for rank in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="positive int"):
            export_lora(model, tmp_path, rank=rank)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        export_lora(model, tmp_path / "file")

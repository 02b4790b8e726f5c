"""A merged model is the base model's own format, computes the same, and leaves the model alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graftune
from graftune.integrations.sharing.export import export_merged
from support.exports import assert_same, flora
from support.models import MODELS
from support.untouched import assert_untouched, snapshot

OWN_FORMAT = {
    "transformers-clip": ["config.json", "model.safetensors"],
    "transformers-llama": ["config.json", "generation_config.json", "model.safetensors"],
    "diffusers-unet": ["config.json", "diffusion_pytorch_model.safetensors"],
    "open_clip-vit": ["model.safetensors"],
    "timm-convnext": ["model.safetensors"],
    "torch-cnn": ["model.safetensors"],
}


@pytest.fixture(autouse=True)
def no_fused_attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def reload(folder: Path, base: nn.Module) -> nn.Module:
    """Load a folder as its library does."""
    if hasattr(base, "from_pretrained"):
        dtype = next(base.parameters()).dtype
        return type(base).from_pretrained(folder, torch_dtype=dtype).eval()
    base.load_state_dict(load_file(folder / "model.safetensors"))
    return base


@pytest.mark.parametrize("family", OWN_FORMAT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_loads_by_its_library_and_computes_the_same(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = MODELS[family]
    model = flora(case, dtype)
    before = snapshot(model)
    report = export_merged(model, tmp_path)
    assert_untouched(model, before)
    assert [file.name for file in report.files] == OWN_FORMAT[family]
    assert sorted(path.name for path in tmp_path.iterdir()) == OWN_FORMAT[family]
    assert report.exact
    assert report.error == 0
    merged = reload(tmp_path, case.build().to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_same(case, merged, model, tolerance)
    base = case.build().to(dtype).state_dict()
    assert {k: t.dtype for k, t in merged.state_dict().items()} == {
        k: t.dtype for k, t in base.items()
    }
    unchanged = [k for k, t in merged.state_dict().items() if torch.equal(t, base[k])]
    assert len(base) - len(unchanged) == len(report.errors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_and_its_rounding_reported(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    case = MODELS["timm-vit"]
    model = flora(case, dtype, scale=0.1)
    report = export_merged(model, tmp_path)
    merged = load_file(tmp_path / "model.safetensors")
    base = {name: t.double() for name, t in case.build().to(dtype).state_dict().items()}
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    layers = dict(model.get_base_model().named_modules())
    largest, squared_error, squared_norm = 0.0, 0.0, 0.0
    for name, error in report.errors.items():
        layer: Any = layers[name.removesuffix(".weight")]
        delta = layer.get_delta_weight("default").detach().double()
        off = merged[name].double() - base[name] - delta
        assert error == pytest.approx(float(off.norm() / delta.norm()), rel=1e-3)
        largest = max(largest, float(off.abs().max()))
        squared_error += float(off.square().sum())
        squared_norm += float(delta.square().sum())
    assert not report.exact
    assert report.error == pytest.approx((squared_error / squared_norm) ** 0.5, rel=1e-3)
    assert report.max_rounding == pytest.approx(largest, rel=1e-3)


def test_tied_weights_come_apart_when_one_of_them_is_adapted(tmp_path: Path) -> None:
    case = MODELS["transformers-gpt2"]
    model = flora(case, target_modules=["wte", "c_attn"])
    export_merged(model, tmp_path)
    assert model.get_base_model().config.tie_word_embeddings
    merged = reload(tmp_path, case.build())
    assert not merged.config.tie_word_embeddings  # type: ignore[union-attr]
    assert_same(case, merged, model, 1e-5)


def test_tied_weights_stay_tied_otherwise(tmp_path: Path) -> None:
    export_merged(flora(MODELS["transformers-gpt2"]), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert reload(tmp_path, MODELS["transformers-gpt2"].build()).config.tie_word_embeddings  # type: ignore[union-attr]


def test_modules_trained_in_full_take_their_place(tmp_path: Path) -> None:
    case = MODELS["transformers-vit"]
    model = flora(case, modules_to_save=["classifier"])
    graftune.wrap(model, "flora", adapter_name="other", r=2, modules_to_save=["classifier"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(1.0)
    model.set_adapter("other")
    before = snapshot(model)
    export_merged(model, tmp_path)
    assert_untouched(model, before)
    model.set_adapter("default")
    assert_same(case, reload(tmp_path, case.build()), model, 1e-5)


METHODS = {
    "IA3": peft.IA3Config(feedforward_modules=["mlp.fc2"], init_ia3_weights=False),
    "OFT": peft.OFTConfig(oft_block_size=8, init_weights=False),
    "LoHa": peft.LoHaConfig(r=2, alpha=16, init_weights=False),
    "DoRA": peft.LoraConfig(r=2, init_lora_weights=False, use_dora=True),
    "SHiRA": peft.ShiraConfig(r=2, init_weights=False),
    "AdaLoRA": peft.AdaLoraConfig(total_step=9, init_lora_weights=False),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_of_peft(method: str, tmp_path: Path) -> None:
    case = MODELS["timm-vit"]
    config = METHODS[method]
    config.target_modules = {"attn.qkv", "mlp.fc2"}
    model = peft.get_peft_model(case.build(), config).eval()
    before = snapshot(model)
    assert export_merged(model, tmp_path).exact
    assert_untouched(model, before)
    assert_same(case, reload(tmp_path, case.build()), model, 1e-4)


def test_an_attention_of_pefts_lora(tmp_path: Path) -> None:
    """Such a layer replaces its parameters when it is merged: the copy's, not the model's."""
    case = MODELS["open_clip-vit"]
    config = peft.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False)
    model = peft.get_peft_model(case.build(), config).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_merged(model, tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == case.build().state_dict().keys()


def test_a_folder_with_other_weights_is_left_alone(tmp_path: Path) -> None:
    model = flora(MODELS["transformers-vit"])
    export_merged(model, tmp_path)
    export_merged(model, tmp_path)  # its own are replaced
    other = tmp_path / "model-00001-of-00002.safetensors"
    other.write_bytes(b"")
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="model-00001-of-00002"):
        export_merged(model, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = flora(MODELS["timm-vit"])
    export_merged(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(path: Path, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(before[:99])
        raise OSError(28, "No space left on device")

    module = importlib.import_module("graftune.integrations.sharing.export.files")
    monkeypatch.setattr(module, "save_file", lambda tensors, path, metadata: full(path))
    with pytest.raises(OSError, match="No space left"):
        export_merged(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    model = flora(MODELS["timm-vit"])
    layer: Any = model.get_base_model().get_submodule("blocks.0.attn.qkv")
    weight = layer.get_base_layer().weight
    layer.get_base_layer().weight = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv.weight' is quantised \(int8\)"):
        export_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

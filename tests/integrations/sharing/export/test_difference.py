"""A difference of weights holds for every adapter that merges, and adds to the base alone."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import graftune
from graftune.integrations.sharing.export import apply_difference, export_difference, export_merged
from support.exports import assert_same, flora
from support.models import MODELS
from support.untouched import assert_untouched, snapshot

FAMILIES = [
    "transformers-clip",
    "transformers-gpt2",
    "open_clip-vit",
    "timm-convnext",
    "diffusers-unet",
    "torch-transformer",
    "torch-cnn",
]


@pytest.fixture(autouse=True)
def no_fused_attention() -> Any:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "difference.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_and_the_difference_are_the_adapted_model(family: str, file: Path) -> None:
    case = MODELS[family]
    model = flora(case, torch.float64)
    before = snapshot(model)
    report = export_difference(model, file)
    assert_untouched(model, before)
    assert report.exact
    assert report.tensors == len(load_file(file)) == len(report.errors)
    base = case.build().double()
    assert apply_difference(base, file) is base
    assert_same(case, base, model, 1e-12)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float64}


def test_the_three_lines_of_the_documentation(file: Path) -> None:
    case = MODELS["transformers-vit"]
    adapted = flora(case)
    export_difference(adapted, file)
    lines = inspect.getdoc(export_difference).partition("in three lines::\n\n")[2]  # type: ignore[union-attr]
    code = inspect.cleandoc(lines).replace("difference.safetensors", str(file))
    model = case.build()
    exec(code, {"model": model})
    assert_same(case, model, adapted, 1e-5)


METHODS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(r=2, lora_alpha=5, use_rslora=True, init_lora_weights=False),
    "DoRA": peft.LoraConfig(r=2, init_lora_weights=False, use_dora=True),
    "LoKr": peft.LoKrConfig(r=2, alpha=8, init_weights=False),
    "IA3": peft.IA3Config(feedforward_modules=["mlp.fc2"], init_ia3_weights=False),
    "OFT": peft.OFTConfig(oft_block_size=8, init_weights=False),
    "HRA": peft.HRAConfig(r=2, init_weights=False),
    "VeRA": peft.VeraConfig(r=2, init_weights=False),
    "SHiRA": peft.ShiraConfig(r=2, init_weights=False),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_merges(method: str, file: Path) -> None:
    case = MODELS["timm-vit"]
    config: Any = METHODS[method]
    config.target_modules = {"attn.qkv"} if method == "VeRA" else {"attn.qkv", "mlp.fc2"}
    config.modules_to_save = ["head"]
    model = peft.get_peft_model(case.build(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    before = snapshot(model)
    export_difference(model, file)
    assert_untouched(model, before)
    assert_same(case, apply_difference(case.build(), file), model, 1e-4)


def test_biases_that_change_with_the_weights(file: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    fresh = copy.deepcopy(base)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    model = peft.get_peft_model(base, config)
    assert list(export_difference(model, file).errors) == ["0.weight", "0.bias"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(apply_difference(fresh, file)(x), model(x))


def test_parameters_under_several_layers(file: Path) -> None:
    case = MODELS["open_clip-vit"]
    names = ["attn.in_proj_weight", "visual.transformer.resblocks.0.mlp.c_fc.weight"]
    config = peft.LoraConfig(
        r=2, target_modules=["c_proj"], target_parameters=names, init_lora_weights=False
    )
    model = peft.get_peft_model(case.build(), config)
    export_difference(model, file)
    assert_same(case, apply_difference(case.build(), file), model, 1e-5)


def test_layers_that_are_swapped_when_merged(file: Path) -> None:
    case = MODELS["transformers-llama"]
    model = peft.get_peft_model(
        case.build(), peft.LNTuningConfig(target_modules=["input_layernorm"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    export_difference(model, file)
    assert_same(case, apply_difference(case.build(), file), model, 1e-5)


def test_the_header_says_what_it_is(file: Path) -> None:
    model = flora(MODELS["timm-vit"])
    model.peft_config["default"].base_model_name_or_path = "user/base"
    export_difference(model, file)
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    assert metadata["kind"] == "weight difference"
    assert metadata["method"] == "FLORA"
    assert metadata["base_model"] == "user/base"
    assert metadata["base_digest"].startswith("1:")
    assert load_file(file).keys() <= MODELS["timm-vit"].build().state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_smaller_dtype_is_reported(dtype: torch.dtype, file: Path) -> None:
    case = MODELS["timm-vit"]
    model = flora(case)
    full, less = export_difference(model, file), export_difference(model, file, dtype=dtype)
    stored = load_file(file)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert full.exact
    assert not less.exact
    assert full.error == 0 < full.max_rounding < 1e-6
    layers = dict(model.get_base_model().named_modules())
    for name, error in less.errors.items():
        layer: Any = layers[name.removesuffix(".weight")]
        delta = layer.get_delta_weight("default").detach().double()
        off = stored[name].double() - delta
        assert error == pytest.approx(float(off.norm() / delta.norm()), rel=1e-3)
    with pytest.raises(TypeError, match="floating"):
        export_difference(model, file, dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_gets_what_merging_gives_it(
    dtype: torch.dtype, file: Path, tmp_path: Path
) -> None:
    case = MODELS["timm-vit"]
    model = flora(case, dtype)
    export_difference(model, file)
    export_merged(model, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    applied = apply_difference(case.build().to(dtype), file).state_dict()
    for name, tensor in merged.items():
        assert applied[name].dtype == dtype
        torch.testing.assert_close(applied[name], tensor, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_shared_tensors(file: Path) -> None:
    model = flora(MODELS["transformers-gpt2"], target_modules=["wte"])
    with pytest.raises(ValueError, match=r"'transformer.wte.weight' .*'lm_head.weight'"):
        export_difference(model, file)
    assert not file.exists()

    both = MODELS["transformers-gpt2"].build()
    model = graftune.wrap(both, "flora", r=2, target_modules=["wte", "lm_head"], init_weights=False)
    layers: list[Any] = [both.transformer.wte, both.lm_head]  # type: ignore[union-attr]
    for name in layers[0].adapter_layer_names:
        getattr(layers[1], name)["default"].data.copy_(getattr(layers[0], name)["default"].data)
    report = export_difference(model, file)
    assert list(report.errors) == ["transformer.wte.weight", "lm_head.weight"]
    assert list(load_file(file)) == ["transformer.wte.weight"]
    base = MODELS["transformers-gpt2"].build()
    assert_same(MODELS["transformers-gpt2"], apply_difference(base, file), model, 1e-5)


def test_another_base_is_refused_and_left_alone(file: Path) -> None:
    case = MODELS["timm-vit"]
    export_difference(flora(case), file)
    other = case.build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before = snapshot(other)
    with pytest.raises(graftune.BaseModelMismatchError, match="another base model"):
        apply_difference(other, file)
    with pytest.raises(ValueError, match="check_base is"):
        apply_difference(other, file, check_base="no")  # type: ignore[arg-type]
    assert_untouched(other, before)
    sibling = copy.deepcopy(other)
    with pytest.warns(UserWarning, match="another base model"):
        apply_difference(sibling, file, check_base="warn")
    apply_difference(other, file, check_base="off")
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, sibling.state_dict()[name])


def test_names_and_shapes_are_checked_first(file: Path) -> None:
    export_difference(flora(MODELS["timm-vit"]), file)
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    tensors = load_file(file)
    base = MODELS["timm-vit"].build()
    before = snapshot(base)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: torch.ones(2, 2)}, file, metadata)
    with pytest.raises(graftune.AdapterMismatchError, match=f"another shape.*{name}"):
        apply_difference(base, file)
    tensors[name.replace("blocks.1", "blocks.7")] = tensors.pop(name)
    save_file(tensors, file, metadata)
    with pytest.raises(graftune.AdapterMismatchError, match="no place for"):
        apply_difference(base, file)
    assert_untouched(base, dict(before))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="no difference of weights"):
        apply_difference(base, file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        apply_difference(base, file)
    with pytest.raises(FileNotFoundError):
        apply_difference(base, file.with_name("missing.safetensors"))
    assert_untouched(base, before)


def test_an_adapter_that_changes_nothing(file: Path) -> None:
    model = graftune.wrap(MODELS["timm-vit"].build(), "flora", r=2)
    with pytest.raises(ValueError, match="changes no weight"):
        export_difference(model, file)
    assert not file.exists()

"""Adapters in pipelines of diffusers: put in, switched off, weighed, merged, saved, refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import CLIPTextModel

import graftune
from graftune.integrations.sharing.export import export_lora
from support import folders
from support.pipelines import draw, flux, stable_diffusion

Make = Callable[[], Any]
CPU = torch.device("cpu")
# FLoRA's targets without convolutions, and SaRA's smallest tenth.
METHODS: dict[str, dict[str, Any]] = {
    "flora": {"r": 2, "target_modules": ["to_q", "to_v", "conv1"]},
    "sara": {"fraction": 0.1},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "base"
    stable_diffusion(path)
    return path


@pytest.fixture
def make(folder: Path) -> Make:
    return lambda: stable_diffusion(folder)


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def wrapped(pipeline: Any, method: str, seed: int = 0, **options: Any) -> PeftModel:
    """An adapter that is not at its start."""
    torch.manual_seed(seed)
    return graftune.wrap(pipeline, method, init_weights=False, **METHODS[method], **options)


def saved(make: Make, method: str, folder: Path, **options: Any) -> tuple[Path, Tensor]:
    pipeline = make()
    wrapped(pipeline, method, **options).save_pretrained(folder)
    return folder, draw(pipeline)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5)


# Put in.


def test_one_call_puts_a_saved_adapter_in(make: Make, method: str, tmp_path: Path) -> None:
    base = draw(make())
    adapter, expected = saved(make, method, tmp_path)
    pipeline = make()
    unet = pipeline.unet
    model = graftune.load(pipeline, adapter)
    assert torch.equal(draw(pipeline), expected)
    assert not torch.equal(expected, base)
    # The pipeline has the model that it had.
    assert pipeline.unet is unet is model.get_base_model()
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert graftune.attached(pipeline).get_base_model() is unet


def test_a_pipelines_name_on_the_hub_is_recorded(make: Make) -> None:
    pipeline = make()
    assert wrapped(pipeline, "flora").peft_config["default"].base_model_name_or_path is None
    pipeline = make()
    pipeline.register_to_config(_name_or_path="user/pipeline")
    config = wrapped(pipeline, "flora").peft_config["default"]
    assert config.base_model_name_or_path == "user/pipeline"


def test_a_saved_adapter_is_small(make: Make, folder: Path, tmp_path: Path) -> None:
    saved(make, "sara", tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size < 0.2 * os.path.getsize(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_a_flow_transformers_pipeline(method: str, tmp_path: Path, guidance_embeds: bool) -> None:
    def make() -> Any:
        return flux(guidance_embeds)

    base = draw(make())
    adapter, expected = saved(make, method, tmp_path)
    pipeline = make()
    model = graftune.load(pipeline, adapter)
    assert torch.equal(draw(pipeline), expected)
    assert not torch.equal(expected, base)
    with model.disable_adapter():
        assert torch.equal(draw(pipeline), base)
    model.merge_and_unload()
    assert close(draw(pipeline), expected)


def test_an_adapter_of_the_text_encoder_finds_it(make: Make, tmp_path: Path) -> None:
    pipeline = make()
    torch.manual_seed(0)
    options = {"r": 2, "init_weights": False, "target_modules": ["q_proj"]}
    model = graftune.wrap(pipeline, "flora", component="text_encoder", **options)
    expected = draw(pipeline)
    model.save_pretrained(tmp_path)
    other = make()
    loaded = graftune.load(other, tmp_path)
    assert isinstance(loaded.get_base_model(), CLIPTextModel)
    assert torch.equal(draw(other), expected)
    loaded.unload()
    assert torch.equal(draw(other), draw(make()))


def test_an_adapter_goes_on_training(make: Make, method: str, tmp_path: Path) -> None:
    adapter, _ = saved(make, method, tmp_path)
    pipeline = make()
    model = graftune.load(pipeline, adapter, is_trainable=True)
    trained = {name for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    assert trained
    assert all(f".{method}_" in name for name in trained)
    assert model.active_adapters == ["default"]


def test_a_peft_lora_is_loaded_as_well(make: Make, tmp_path: Path) -> None:
    pipeline = make()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    graftune.wrap(pipeline, config).save_pretrained(tmp_path)
    expected = draw(pipeline)
    other = make()
    model = graftune.load(other, tmp_path)
    assert torch.equal(draw(other), expected)
    model.unload()
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


# diffusers' own calls.


def test_diffusers_switches_it_off_and_on(make: Make, method: str, tmp_path: Path) -> None:
    base = draw(make())
    adapter, expected = saved(make, method, tmp_path)
    pipeline = make()
    model = graftune.load(pipeline, adapter)
    with model.disable_adapter():
        assert torch.equal(draw(pipeline), base)
    for off, on in (
        (pipeline.disable_lora, pipeline.enable_lora),
        (pipeline.unet.disable_adapters, pipeline.unet.enable_adapters),
    ):
        off()
        assert torch.equal(draw(pipeline), base)
        on()
        assert torch.equal(draw(pipeline), expected)
    assert pipeline.unet.active_adapters() == ["default"]
    assert close(draw(pipeline, cross_attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(draw(pipeline), expected)
    pipeline.unet.delete_adapters("default")
    assert torch.equal(draw(pipeline), base)
    graftune.load(pipeline, adapter)
    assert torch.equal(draw(pipeline), expected)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), base)
    graftune.load(pipeline, adapter)
    assert torch.equal(draw(pipeline), expected)


def test_two_adapters_with_weights(make: Make, method: str, tmp_path: Path) -> None:
    first, one = saved(make, method, tmp_path / "one")
    second, two = saved(make, method, tmp_path / "two", seed=1)
    pipeline = make()
    graftune.load(pipeline, first, adapter_name="one")
    # Named as the end of parameters' names are.
    model = graftune.load(pipeline, second, adapter_name="b")
    assert pipeline.get_list_adapters() == {"unet": ["one", "b"]}
    assert model.active_adapters == pipeline.get_active_adapters() == ["b"]
    assert torch.equal(draw(pipeline), two)
    pipeline.set_adapters(["one", "b"], [1.0, 0.0])
    assert close(draw(pipeline), one)
    pipeline.set_adapters(["one", "b"], [0.5, 0.5])
    both = draw(pipeline)
    assert not close(both, one)
    assert not close(both, two)
    pipeline.set_adapters("one")
    assert torch.equal(draw(pipeline), one)
    assert graftune.attached(pipeline).active_adapters == ["one"]
    with pytest.raises(ValueError, match="already has an adapter 'b'"):
        graftune.load(pipeline, second, adapter_name="b")


def test_merged_it_is_an_ordinary_pipeline(make: Make, method: str, tmp_path: Path) -> None:
    adapter, expected = saved(make, method, tmp_path / "adapter")
    pipeline = make()
    graftune.load(pipeline, adapter).merge_and_unload()
    assert close(draw(pipeline), expected)
    pipeline.save_pretrained(tmp_path / "merged")
    assert close(draw(stable_diffusion(tmp_path / "merged")), expected)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))  # nothing is left behind


def test_fused_and_unfused_by_diffusers(make: Make, method: str, tmp_path: Path) -> None:
    adapter, expected = saved(make, method, tmp_path)
    pipeline = make()
    graftune.load(pipeline, adapter)
    pipeline.fuse_lora()
    assert close(draw(pipeline), expected)
    pipeline.unfuse_lora()
    assert torch.equal(draw(pipeline), expected)


def test_what_diffusers_attached_is_saved_and_loaded(make: Make, tmp_path: Path) -> None:
    pipeline = make()
    torch.manual_seed(0)
    pipeline.unet.add_adapter(graftune.SaraConfig(fraction=0.1, init_weights=False))
    expected = draw(pipeline)
    model = graftune.attached(pipeline)
    assert any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    other = make()
    other.unet.add_adapter(graftune.SaraConfig(fraction=0.1), "first")
    graftune.load(other, tmp_path, adapter_name="second")
    assert torch.equal(draw(other), expected)
    model.merge_and_unload()
    pipeline.unet.add_adapter(graftune.SaraConfig(fraction=0.1))


def test_a_lora_of_diffusers_beside_it(make: Make, method: str, tmp_path: Path) -> None:
    adapter, expected = saved(make, method, tmp_path / "adapter")
    lora = wrapped(make(), "flora", seed=1)
    export_lora(lora, tmp_path / "lora", layout="diffusers")
    alone = make()
    alone.load_lora_weights(tmp_path / "lora")
    of_lora = draw(alone)
    pipeline = make()
    graftune.load(pipeline, adapter, adapter_name="first")
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="second")
    pipeline.set_adapters(["first", "second"])
    both = draw(pipeline)
    assert not close(both, expected)
    assert not close(both, of_lora)
    for name, drawn in (("first", expected), ("second", of_lora)):
        pipeline.set_adapters(name)
        assert close(draw(pipeline), drawn)
    with pytest.raises(ValueError, match=r"several methods \('\w+', '\w+'\)"):
        graftune.attached(pipeline)
    with pytest.raises(ValueError, match="of the method LORA: one model takes loaded adapters"):
        graftune.load(alone, adapter, adapter_name="first")
    assert close(draw(alone), of_lora)


# Moved and offloaded.


def test_it_moves_with_the_pipeline(make: Make, method: str, tmp_path: Path) -> None:
    adapter, _ = saved(make, method, tmp_path)
    pipeline = make()
    graftune.load(pipeline, adapter)
    pipeline.to(torch.bfloat16)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
    assert torch.isfinite(draw(pipeline)).all()
    pipeline.to("meta")
    assert all(p.is_meta for p in pipeline.unet.parameters())


@pytest.mark.parametrize("before", [True, False])
def test_offloading_whole_models(make: Make, method: str, tmp_path: Path, before: bool) -> None:
    """By the hook that `enable_model_cpu_offload` sets, which needs no second device here."""
    adapter, expected = saved(make, method, tmp_path)
    pipeline = make()
    if before:
        accelerate.cpu_offload_with_hook(pipeline.unet, CPU)
    graftune.load(pipeline, adapter)
    if not before:
        accelerate.cpu_offload_with_hook(pipeline.unet, CPU)
    assert torch.equal(draw(pipeline), expected)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_offloading_groups(make: Make, method: str, tmp_path: Path, kind: str) -> None:
    adapter, expected = saved(make, method, tmp_path)
    pipeline = make()
    graftune.load(pipeline, adapter)
    pipeline.unet.enable_group_offload(CPU, CPU, kind, num_blocks_per_group=1)
    assert torch.equal(draw(pipeline), expected)


def test_offloading_one_by_one_is_refused(make: Make, method: str, tmp_path: Path) -> None:
    adapter, _ = saved(make, method, tmp_path)
    pipeline = make()
    graftune.load(pipeline, adapter)
    accelerate.cpu_offload(pipeline.unet, CPU)
    with pytest.raises(RuntimeError, match="not in memory: weights are offloaded one by one"):
        draw(pipeline)
    other = make()
    base = draw(other)
    accelerate.cpu_offload(other.unet, CPU)
    with pytest.raises(ValueError, match=r"'unet' are not in memory .*remove_all_hooks"):
        graftune.load(other, adapter)
    assert torch.equal(draw(other), base)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_before(make: Make, method: str, tmp_path: Path, in_place: bool) -> None:
    adapter, expected = saved(make, method, tmp_path)
    pipeline = make()
    if in_place:
        pipeline.unet.compile(backend="eager")
    else:
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    base = draw(pipeline)
    graftune.load(pipeline, adapter)
    assert close(draw(pipeline), expected)
    assert not close(base, expected)


# Refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"component": "unett"}, r"has no model 'unett'\. Did you mean 'unet'.*'vae' \(Autoenc"),
        ({"component": "scheduler"}, "has no model 'scheduler'"),
        ({"component": "vae"}, r"trained on a UNet2DConditionModel, and 'vae' is a.*'unet'"),
    ],
)
def test_what_does_not_fit_is_named(
    make: Make, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    adapter, _ = saved(make, "flora", tmp_path)
    pipeline = make()
    base = draw(pipeline)
    with pytest.raises(ValueError, match=message):
        graftune.load(pipeline, adapter, **options)
    assert torch.equal(draw(pipeline), base)
    assert not hasattr(pipeline.unet, "peft_config")


def test_another_base_is_refused(make: Make, method: str, tmp_path: Path) -> None:
    adapter, _ = saved(make, method, tmp_path)
    pipeline = make()
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.5)
    base = draw(pipeline)
    with pytest.raises(graftune.BaseModelMismatchError):
        graftune.load(pipeline, adapter)
    assert torch.equal(draw(pipeline), base)


def test_a_pipeline_without_the_model_is_named(make: Make, tmp_path: Path) -> None:
    adapter, _ = saved(make, "flora", tmp_path / "adapter")
    pixels = DDPMPipeline.from_pretrained(folders.pixel_pipeline(tmp_path / "pixels"))
    with pytest.raises(
        ValueError, match=r"no UNet2DConditionModel, which the.*'unet' \(UNet2DModel\)"
    ):
        graftune.load(pixels, adapter)
    parts = {name: part for name, part in make().components.items() if name != "unet"}
    empty = StableDiffusionPipeline(**parts, unet=None, requires_safety_checker=False)
    with pytest.raises(ValueError, match="has no unet or transformer"):
        graftune.wrap(empty, "flora")


def test_several_models_of_one_class_are_named(make: Make, tmp_path: Path) -> None:
    pipeline = make()
    options = {"r": 2, "target_modules": ["q_proj"]}
    graftune.wrap(pipeline, "flora", component="text_encoder", **options).save_pretrained(tmp_path)

    class Twice(StableDiffusionPipeline):
        @property
        def components(self) -> dict[str, Any]:
            return super().components | {"text_encoder_2": self.text_encoder}

    twice = Twice(**make().components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="`component`, 'text_encoder' or 'text_encoder_2'"):
        graftune.load(twice, tmp_path)
    graftune.load(twice, tmp_path, component="text_encoder_2")


def test_a_lora_of_diffusers_is_sent_to_diffusers(make: Make, tmp_path: Path) -> None:
    lora = wrapped(make(), "flora")
    export_lora(lora, tmp_path, layout="diffusers")
    with pytest.raises(ValueError, match=r"LoRA of diffusers .*pipeline\.load_lora_weights"):
        graftune.load(make(), tmp_path)


def test_adapters_of_another_method_are_named(make: Make, tmp_path: Path) -> None:
    adapter, _ = saved(make, "sara", tmp_path)
    pipeline = make()
    wrapped(pipeline, "flora")
    expected = draw(pipeline)
    with pytest.raises(ValueError, match=r"method is SARA, and the model has 'default'.*FLORA"):
        graftune.load(pipeline, adapter, adapter_name="sara")
    assert torch.equal(draw(pipeline), expected)


def test_a_component_is_for_pipelines() -> None:
    for call in (
        lambda: graftune.wrap(nn.Linear(2, 2), "flora", component="unet"),
        lambda: graftune.attached(nn.Linear(2, 2), component="unet"),
    ):
        with pytest.raises(ValueError, match="component='unet' is for a pipeline of diffusers"):
            call()
    with pytest.raises(ValueError, match="the Linear has no adapters"):
        graftune.attached(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module or a pipeline of diffusers, got str"):
        graftune.wrap("unet", "flora")


# What `load_lora_weights` makes of folders.


def test_diffusers_own_loader_takes_neither_method(make: Make, tmp_path: Path) -> None:
    """What the documentation says of it; a change here is a change there."""
    base = draw(make())
    sara, _ = saved(make, "sara", tmp_path / "sara")
    flora, _ = saved(make, "flora", tmp_path / "flora")
    pipeline = make()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(sara, weight_name="adapter_model.safetensors")
    # "flora" contains "lora": it is taken for a LoRA of other parts, and nothing happens.
    pipeline.load_lora_weights(flora, weight_name="adapter_model.safetensors")
    assert torch.equal(draw(pipeline), base)
    assert pipeline.get_list_adapters() == {}


def test_flora_exported_is_loaded_by_diffusers(make: Make, tmp_path: Path) -> None:
    pipeline = make()
    model = wrapped(pipeline, "flora")
    expected = draw(pipeline)
    report = export_lora(model, tmp_path, layout="diffusers")
    assert report.exact
    assert sorted(f.name for f in report.files) == ["README.md", "pytorch_lora_weights.safetensors"]
    assert "pipeline.load_lora_weights" in (tmp_path / "README.md").read_text()
    other = make()
    other.load_lora_weights(tmp_path)
    assert close(draw(other), expected)


def test_flora_of_a_flow_is_loaded_by_diffusers(tmp_path: Path) -> None:
    pipeline = flux()
    torch.manual_seed(0)
    model = graftune.wrap(
        pipeline, "flora", init_weights=False, r=2, rank_pattern={"to_k": [3, 1]}, scale=2.0
    )
    expected = draw(pipeline)
    export_lora(model, tmp_path, layout="diffusers")
    other = flux()
    other.load_lora_weights(tmp_path)
    assert close(draw(other), expected)


def test_diffusers_layout_is_refused_where_it_cannot_be(make: Make, tmp_path: Path) -> None:
    plain = graftune.wrap(nn.Sequential(nn.Linear(4, 4)), "flora", r=2)
    with pytest.raises(ValueError, match=r"unet or transformer of diffusers.*Sequential"):
        export_lora(plain, tmp_path, layout="diffusers")
    with pytest.raises(ValueError, match="`layout` is 'peft' or 'diffusers', got 'kohya'"):
        export_lora(plain, tmp_path, layout="kohya")  # type: ignore[arg-type]
    model = graftune.wrap(
        make(), "flora", r=2, target_modules=["to_q"], modules_to_save=["conv_in"]
    )
    with pytest.raises(ValueError, match=r"this adapter changes 'conv_in'"):
        export_lora(model, tmp_path, layout="diffusers")
    assert not list(tmp_path.iterdir())


def test_a_model_loaded_from_a_path_is_saved_with_a_card(tmp_path: Path) -> None:
    unet = stable_diffusion(tmp_path / "pipeline").unet
    unet.save_pretrained(tmp_path / "base")
    model = graftune.wrap(type(unet).from_pretrained(tmp_path / "base"), "sara", fraction=0.1)
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "PosixPath" not in card
    assert "graftune.load" in card

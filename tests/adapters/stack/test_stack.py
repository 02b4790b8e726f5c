"""Several methods on one model: everything that holds for one method holds for them together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
)
from safetensors.torch import load_file
from torch import nn

import graftune
from graftune import DeepPromptConfig, FloraConfig, MaskTuningConfig
from graftune.adapters.base.frozen import frozen_base
from graftune.adapters.base.weights import weight_changes
from graftune.adapters.stack import StackConfig, merge_order, save_parts
from support.models import MODELS, loss
from support.untouched import assert_untouched, snapshot

PROMPTS = {"num_tokens_text": 3, "num_tokens_vision": 2, "depth_text": 2, "depth_vision": 1}
LLAMA = ["q_proj", "v_proj", "down_proj"]
OPEN_CLIP = ["c_fc", "out_proj", "attn"]


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets) or "all-linear", **options)


def prompts() -> DeepPromptConfig:
    return DeepPromptConfig(**PROMPTS, init_text=None)


# Model, and methods as a user gives them.
STACKS: dict[str, tuple[str, list[Any]]] = {
    "lora, flora": ("transformers-llama", [lora(*LLAMA), FloraConfig(r=2)]),
    "flora, lora": ("transformers-llama", [FloraConfig(r=2, target_modules=LLAMA), lora()]),
    "lora, mask": ("transformers-llama", [lora(*LLAMA), "mask_tuning"]),
    "dora, mask": ("transformers-vit", [lora(use_dora=True), "mask_tuning"]),
    "mask, lora": ("transformers-gpt2", ["mask_tuning", lora("c_attn", "c_proj")]),
    "mask, flora, lora": ("transformers-vit", ["mask_tuning", "flora", lora()]),
    "oft, mask": ("transformers-vit", [OFTConfig(oft_block_size=4), "mask_tuning"]),
    "prompts, mask": ("transformers-clip", [prompts(), "mask_tuning"]),
    "mask, prompts": ("open_clip-vit", ["mask_tuning", prompts()]),
    "prompts, flora, mask": ("open_clip-vit", [prompts(), "flora", "mask_tuning"]),
    "flora, mask": ("torch-cnn", ["flora", "mask_tuning"]),
    "mask, flora": ("diffusers-unet", ["mask_tuning", "flora"]),
    "prompts, lora of tokens": (
        "transformers-clip",
        [prompts(), lora("token_embedding", "patch_embedding", "fc1", init_lora_weights=False)],
    ),
    "sara, flora": ("torch-cnn", ["sara", "flora"]),
    "sara, lora": ("transformers-vit", ["sara", lora()]),
    "ia3, mask": (
        "transformers-llama",
        [IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "mask_tuning"],
    ),
    "packed flora, mask": ("open_clip-vit", ["flora", "mask_tuning"]),
    "packed mask, flora": ("open_clip-vit", ["mask_tuning", "flora"]),
}
MERGING = [name for name in STACKS if "prompts" not in name]
pytestmark = pytest.mark.filterwarnings("ignore:the adapter has at least as many numbers")


def wrapped(name: str, **options: Any) -> Any:
    model, methods = STACKS[name]
    torch.manual_seed(1)
    return graftune.wrap(MODELS[model].build(), methods, regularizers=[], **options)


def trained(name: str) -> Any:
    """A stack whose parameters are not those it starts with."""
    return moved(wrapped(name))


def moved(model: Any) -> Any:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                # Of the scores some cross the threshold.
                scale = 0.01 if "mask_tuning" in key else 0.05
                parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def run(name: str, model: nn.Module) -> torch.Tensor:
    case = MODELS[STACKS[name][0]]
    return case.run(model, case.batch())


def base_of(name: str) -> nn.Module:
    # Frozen, so that attention takes the same of PyTorch's paths with and without adapters.
    return MODELS[STACKS[name][0]].build().requires_grad_(False)


@pytest.mark.parametrize("name", STACKS)
def test_it_starts_as_the_base_model_and_is_it_when_disabled(name: str) -> None:
    base = run(name, base_of(name))
    model = wrapped(name).eval()
    if "prompts" not in name:
        torch.testing.assert_close(run(name, model), base, rtol=1e-5, atol=1e-6)
    moved(model)
    assert not torch.allclose(run(name, model), base)
    with model.disable_adapter():
        assert torch.equal(run(name, model), base)
    with frozen_base(model):
        assert torch.equal(run(name, model), base)


@pytest.mark.parametrize("name", STACKS)
def test_all_parts_are_trained_jointly(name: str) -> None:
    model = trained(name)
    case = MODELS[STACKS[name][0]]
    loss(case.run(model, case.batch())).backward()
    parts = {part.lower() for part in model.peft_config["default"].methods}
    reached = set()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == any(
            f".{tuner.prefix}" in key for tuner in model.base_model.tuners
        ), key
        if parameter.grad is not None and parameter.grad.any():
            reached |= {p for p in parts for t in tuners_of(model, p) if f".{t.prefix}" in key}
    assert reached == parts


def tuners_of(model: Any, method: str) -> Iterator[Any]:
    for tuner in model.base_model.tuners:
        if tuner.peft_config["default"].peft_type.value.lower() == method:
            yield tuner


@pytest.mark.parametrize("name", STACKS)
def test_saved_as_one_folder_and_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    expected = run(name, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not [key for key in tensors if "base_layer" in key]
    loaded = graftune.load(base_of(name), tmp_path)
    assert torch.equal(run(name, loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    plain = PeftModel.from_pretrained(base_of(name), tmp_path)
    assert torch.equal(run(name, plain), expected)
    loaded.load_adapter(tmp_path, "default")  # as trainers do to resume
    assert torch.equal(run(name, loaded), expected)


@pytest.mark.parametrize("name", MERGING)
def test_merged_it_computes_the_same_and_comes_back(name: str) -> None:
    model = trained(name)
    expected = run(name, model)
    scale = expected.abs().max().item()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(name, model), expected, rtol=0, atol=2e-5 * scale)
    model.unmerge_adapter()
    torch.testing.assert_close(run(name, model), expected, rtol=0, atol=2e-5 * scale)
    bare = model.merge_and_unload()
    assert [key for key, _ in bare.named_modules()] == [k for k, _ in base_of(name).named_modules()]
    torch.testing.assert_close(run(name, bare), expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("name", STACKS)
def test_unloaded_it_is_the_base_model_bit_for_bit(name: str) -> None:
    bare, base = trained(name).unload(), base_of(name)
    assert not hasattr(bare, "peft_config")
    assert [(k, type(m)) for k, m in bare.named_modules()] == [
        (k, type(m)) for k, m in base.named_modules()
    ]
    assert torch.equal(run(name, bare), run(name, base))
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), base.parameters(), strict=True))


def test_a_mask_acts_on_the_pretrained_weight_wherever_it_stands() -> None:
    outputs = []
    for methods in ([lora(), MaskTuningConfig()], [MaskTuningConfig(), lora()]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 5))
        model = graftune.wrap(base, methods)
        layers = {type(m).__module__.split(".")[-2]: m for m in merge_order(model)}
        mask_layer, lora_layer = layers["mask_tuning"], layers["lora"]
        torch.manual_seed(2)
        with torch.no_grad():
            mask_layer.mask_tuning_scores["default"]["weight"].copy_(0.01 * torch.rand(5, 6))
            lora_layer.lora_B["default"].weight.normal_()
            lora_layer.lora_A["default"].weight.normal_()
        weight, bias = mask_layer.get_base_layer().weight, mask_layer.get_base_layer().bias
        mask = mask_layer.mask("default", "weight").float()
        assert 0 < mask.sum() < mask.numel()
        total = weight * mask + lora_layer.get_delta_weight("default")
        x = torch.randn(3, 6)
        torch.testing.assert_close(model(x), x @ total.T + bias)
        (name, change), *others = weight_changes(model)
        assert (name, others) == ("0.weight", [])
        torch.testing.assert_close(change(), total - weight)
        outputs.append(model(x).detach())
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged[0].weight, total)
    assert torch.equal(*outputs)


def test_what_cannot_be_merged_is_said() -> None:
    model = trained("prompts, mask")
    expected = run("prompts, mask", model)
    with pytest.raises(ValueError, match=r"'deep_prompt': prompts are tokens.*merge_adapter\(\)"):
        model.merge_and_unload()
    with pytest.warns(UserWarning, match=r"'deep_prompt'.*stay attached and active"):
        model.merge_adapter()
    scale = expected.abs().max().item()
    torch.testing.assert_close(run("prompts, mask", model), expected, rtol=0, atol=1e-5 * scale)
    model.unmerge_adapter()
    assert torch.equal(run("prompts, mask", model), expected)


def test_broken_scores_are_no_reason_to_merge_the_rest() -> None:
    model = trained("lora, mask")
    before = run("lora, mask", model)
    scores = [p for key, p in model.named_parameters() if "mask_tuning" in key]
    kept = scores[-1].detach().clone()
    scores[-1].data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    scores[-1].data.copy_(kept)
    assert torch.equal(run("lora, mask", model), before)


@pytest.mark.parametrize("name", ["lora, mask", "prompts, mask"])
def test_several_adapters_of_all_methods(name: str, tmp_path: Path) -> None:
    model = trained(name)
    first = run(name, model)
    assert graftune.wrap(model, STACKS[name][1], adapter_name="other") is model
    assert torch.equal(run(name, model), first)
    model.set_adapter("other")
    moved(model)
    second = run(name, model)
    assert not torch.allclose(first, second)
    model.save_pretrained(tmp_path)
    again = graftune.load(base_of(name), tmp_path / "other")
    assert torch.equal(run(name, again), second)
    model.set_adapter("default")
    assert torch.equal(run(name, model), first)
    third = StackConfig(parts=[FloraConfig(r=2), lora()])
    with pytest.raises(ValueError, match="same ones in the same order"):
        model.add_adapter("third", third)
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert not [key for key in model.state_dict() if "default" in key]
    assert torch.equal(run(name, model), second)


@pytest.mark.parametrize("name", ["lora, mask", "prompts, flora, mask", "mask, flora, lora"])
def test_each_part_can_be_had_alone(name: str, tmp_path: Path) -> None:
    model = trained(name)
    folders = save_parts(model, tmp_path)
    assert list(folders) == model.peft_config["default"].methods
    for method, folder in folders.items():
        alone = graftune.load(base_of(name), folder)
        assert alone.peft_config["default"].peft_type.value.lower() == method
        # The others off: they leave the base model as it is.
        others = [t for t in model.base_model.tuners if t not in list(tuners_of(model, method))]
        for tuner in others:
            for layer in model.modules():
                if isinstance(layer, tuner.tuner_layer_cls):
                    layer._disable_adapters = True
        assert torch.equal(run(name, alone), run(name, model))
        model.base_model.enable_adapter_layers()
    with pytest.raises(TypeError, match=r"of one method \(flora\)"):
        save_parts(graftune.wrap(MODELS["torch-cnn"].build(), "flora", r=2), tmp_path)


def test_the_base_model_is_proven_for_all_parts(tmp_path: Path) -> None:
    trained("lora, mask").save_pretrained(tmp_path)
    other = base_of("lora, mask")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    before = snapshot(other)
    with pytest.raises(graftune.BaseModelMismatchError, match="sampled weights have other values"):
        graftune.load(other, tmp_path)
    assert_untouched(other, before)
    with pytest.warns(UserWarning, match="another base model"):
        graftune.load(other, tmp_path, check_base="warn")


def test_a_file_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained("lora, mask").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    for dropped in ("lora_A", "mask_tuning"):
        whole = load_file(file)
        save_file({k: v for k, v in whole.items() if dropped not in k}, file)
        with pytest.raises(graftune.AdapterMismatchError, match=r"missing|holds no tensors"):
            graftune.load(base_of("lora, mask"), tmp_path)
        save_file(whole, file)


def test_the_config_says_all_parts_in_plain_json(tmp_path: Path) -> None:
    model = graftune.wrap(base_of("lora, mask"), [lora(*LLAMA), "mask_tuning"], threshold=0.004)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "STACK"
    first, second = content["parts"]
    assert (first["peft_type"], sorted(first["target_modules"])) == ("LORA", sorted(LLAMA))
    assert (second["peft_type"], second["threshold"]) == ("MASK_TUNING", 0.004)
    assert [each["name"] for each in content["regularizers"] or ()] == [
        each.name for each in graftune.recipes()["mask_tuning"].regularizers
    ]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (lambda: ["flora", FloraConfig(r=1)], "'flora' is there more than once"),
        (lambda: ["flora", PromptTuningConfig(num_virtual_tokens=2)], "prompts before the input"),
        (lambda: ["flora", VeraConfig(target_modules=["q_proj"])], "state beside its layers"),
        (
            lambda: ["flora", AdaLoraConfig(total_step=3, target_modules=["q_proj"])],
            "a forward pass of its own",
        ),
        (lambda: ["flora", lora(bias="all")], "bias='all' trains biases"),
        (lambda: ["sara", "mask_tuning"], "masks on '.*' would have no gradient, as SaRA"),
        (lambda: ["flora", "floar"], "Did you mean 'flora'"),
        (lambda: ["flora", lora("nowhere")], "not found in the base model"),
        (lambda: [], "no method to attach"),
    ],
)
def test_methods_that_cannot_be_stacked(methods: Any, message: str) -> None:
    base = base_of("lora, mask")
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        graftune.wrap(base, methods())
    assert_untouched(base, before)


def test_lora_of_an_attention_shares_it_with_no_other_method() -> None:
    base = MODELS["open_clip-vit"].build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"MultiheadAttention '.*attn' cannot share it"):
        graftune.wrap(base, [lora("attn"), "mask_tuning"])
    assert_untouched(base, before)
    model = graftune.wrap(base, lora("attn"))
    with pytest.raises(ValueError, match="cannot share it with another method"):
        graftune.wrap(model, "mask_tuning")
    assert model.peft_type == "LORA"
    graftune.wrap(model, MaskTuningConfig(target_modules=["c_fc"]))


def test_what_adds_to_a_hooked_output_comes_before_the_hook() -> None:
    embedding = FloraConfig(r=2, target_modules=["token_embedding"])
    model = graftune.wrap(MODELS["transformers-clip"].build(), prompts(), regularizers=[])
    with pytest.raises(ValueError, match=r"hook is on the output of '.*token_embedding' already"):
        graftune.wrap(model, embedding)
    assert model.peft_type == "DEEP_PROMPT"
    # In one list, in whatever order, the prompts replace what the embedding adds.
    model = graftune.wrap(MODELS["transformers-clip"].build(), [prompts(), embedding])
    moved(model)
    seen = []
    block = model.get_base_model().text_model.encoder.layers[0]
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1:4]))
    run("prompts, mask", model)
    position = model.get_base_model().text_model.embeddings.position_embedding.weight[1:4]
    tokens = next(p for k, p in model.named_parameters() if "text" in k and "deep_prompt" in k)
    torch.testing.assert_close(seen[0], tokens[0] + position)


def test_a_field_that_two_methods_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'r' is a field of 'LoraConfig', 'FloraConfig'"):
        graftune.wrap(base_of("lora, mask"), [lora(), "flora"], r=3)
    with pytest.raises(ValueError, match=r"no field 'treshold'. Did you mean 'threshold'"):
        graftune.wrap(base_of("lora, mask"), [lora(), "mask_tuning"], treshold=3)


def test_batches_of_several_adapters_are_refused() -> None:
    model = trained("lora, flora")
    case = MODELS["transformers-llama"]
    with pytest.raises(ValueError, match="`adapter_names` is not supported"):
        model(**case.batch(), adapter_names=["default"] * 4)

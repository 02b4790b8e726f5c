"""What mask tuning's targets mean in each family."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graftune
from support.models import MODELS


def scores(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix("base_model.model."): tuple(p.shape)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def wrapped(family: str, **options: object) -> nn.Module:
    return graftune.wrap(MODELS[family].build(), "mask_tuning", **options)


def masked(family: str, **options: object) -> set[str]:
    return {name.partition(".mask_tuning_scores")[0] for name in scores(wrapped(family, **options))}


def test_vit_b16_has_the_paper_s_tensors() -> None:
    import open_clip
    from open_clip.model import CLIP

    config = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        model = CLIP(**config)
        found = scores(graftune.wrap(model, "mask_tuning"))
    assert len(found) == 25
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 28_901_376
    assert all(name.startswith("visual.") for name in found)


def test_transformers_clip_has_the_same_weights() -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 768, "intermediate_size": 3072, "patch_size": 16}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(vision_config=vision, bos_token_id=0, eos_token_id=1))
        found = scores(graftune.wrap(model, "mask_tuning"))
    assert len(found) == 49  # projections that open_clip packs are three
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 28_901_376


def test_a_clip_resnet_has_all_convolutions_and_the_attention_pool() -> None:
    model = MODELS["open_clip-resnet"].build()
    expected = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    expected |= {f"visual.attnpool.{name}_proj" for name in "qkvc"}
    assert masked("open_clip-resnet") == expected


def test_words_widen() -> None:
    attention = masked("transformers-clip", targets="attention")
    assert attention == masked("transformers-clip")
    wider = masked("transformers-clip", targets="attention+mlp")
    layers = "vision_model.encoder.layers"
    assert wider - attention == {f"{layers}.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)}
    everything = masked("transformers-clip", targets="all")
    assert everything == wider  # the tower has no other layers
    assert not any("text" in name for name in everything)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("transformers-llama", {"self_attn.q_proj", "self_attn.o_proj"}),
        ("transformers-gpt2", {"attn.c_attn", "attn.c_proj"}),
        ("timm-vit", {"patch_embed.proj", "attn.qkv"}),
        ("diffusers-unet", {"attn1.to_q", "attn2.to_out.0"}),
        ("torch-cnn", {"stem", "up"}),
        ("timm-convnext", {"stem.0", "conv_dw"}),
    ],
)
def test_other_families(family: str, expected: set[str]) -> None:
    names = masked(family)
    for ending in expected:
        assert any(name.endswith(ending) for name in names), ending
    heads = ("lm_head", "head", "head.fc", "classifier", "conv_out")
    assert not names & set(heads)


def test_a_model_of_linear_layers_is_masked_whole() -> None:
    model = graftune.wrap(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "mask_tuning")
    assert set(scores(model)) == {"0.mask_tuning_scores.default.weight"}


def test_targets_stay_in_the_config_and_names_are_taken_as_they_are() -> None:
    model = wrapped("transformers-clip", targets="attention")
    assert model.peft_config["default"].targets == "attention"
    assert masked("transformers-gpt2", targets=["mlp.c_fc"]) == {
        "transformer.h.0.mlp.c_fc",
        "transformer.h.1.mlp.c_fc",
    }
    assert masked("transformers-gpt2", targets="c_fc") == masked(
        "transformers-gpt2", targets=r".*\.mlp\.c_fc"
    )
    again = graftune.wrap(MODELS["transformers-clip"].build(), model.peft_config["default"])
    assert scores(again) == scores(model)


def test_unknown_words_and_two_answers_are_refused() -> None:
    base = MODELS["transformers-clip"].build()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        graftune.wrap(base, "mask_tuning", targets="atention")
    with pytest.raises(ValueError, match="give one of the two"):
        graftune.wrap(base, "mask_tuning", targets="all", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="has no layers that targets='attention'"):
        graftune.wrap(nn.Sequential(nn.ReLU()), "mask_tuning")
    assert all(p.requires_grad for p in base.parameters())
    assert base.state_dict().keys() == before.keys()

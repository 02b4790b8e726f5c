"""Where prompts go in SigLIPs, and what of them is not defined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graftune
from graftune.adapters.base import messages
from graftune.integrations.libraries import towers
from graftune.integrations.libraries.prompts import text_places, vision_places
from graftune.integrations.objectives import ClassNameClassifier
from support.clip import COLOURS, OpenClipTokenizer, clip, transformers_tokenizer
from support.models import MODELS

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHALLOW = {"init_text": None, "depth_text": 2, "depth_vision": 2}


def open_clip_siglip() -> nn.Module:
    """A SigLIP as open_clip builds them: timm's ViT, texts without a start and without a mask."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    vision = CLIPVisionCfg(
        timm_model_name="vit_tiny_patch16_224", timm_pool="map", timm_proj="none", image_size=224
    )
    text = CLIPTextCfg(
        context_length=16,
        vocab_size=64,
        width=32,
        heads=4,
        layers=2,
        no_causal_mask=True,
        proj_bias=True,
        pool_type="last",
    )
    torch.manual_seed(0)
    return CustomTextCLIP(192, vision, text, init_logit_bias=-10.0).eval()


def siglip2() -> nn.Module:
    from transformers import Siglip2Config, Siglip2Model

    text = {**SMALL, "vocab_size": 64, "max_position_embeddings": 16}
    vision = {**SMALL, "num_patches": 16, "patch_size": 8}
    return Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()


def test_a_siglip_of_open_clip_has_its_first_word_at_position_0() -> None:
    base = open_clip_siglip()
    assert text_places(base)["text_start"] == 0
    assert vision_places(base)["vision_blocks"] == "visual.trunk.blocks"
    model = graftune.wrap(base, "promptsrc", regularizers=[], **SHALLOW)
    seen: list[torch.Tensor] = []
    hook = base.text.transformer.resblocks[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["x"]).detach()),
        with_kwargs=True,
    )
    image, text, *_ = model(torch.randn(2, 3, 224, 224), torch.randint(1, 60, (3, 16)))
    hook.remove()
    assert (image.shape, text.shape) == ((2, 192), (3, 192))
    tokens = next(p for n, p in model.named_parameters() if "text" in n and p.requires_grad)
    assert torch.equal(seen[0][0, :4], tokens[1])
    (image.sum() + text.sum()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_siglip2_with_padded_patches_takes_prompts_in_its_texts_only() -> None:
    base = siglip2()
    with pytest.raises(ValueError, match="not defined for the vision tower of Siglip2Model"):
        graftune.wrap(base, "promptsrc", **SHALLOW)
    model = graftune.wrap(base, "promptsrc", num_tokens_vision=0, **SHALLOW)
    batch = {
        "pixel_values": torch.randn(2, 16, 192),
        "pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [12]])).int(),
        "spatial_shapes": torch.tensor([[4, 4], [4, 3]]),
    }
    model(input_ids=torch.randint(1, 60, (3, 16)), **batch).logits_per_image.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    objective = ClassNameClassifier(list(COLOURS), transformers_tokenizer())
    with pytest.raises(TypeError, match="use a SigLIP2 of fixed resolution"):
        objective(model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("family", ["transformers-siglip", "open_clip-siglip"])
def test_texts_of_a_siglip_are_not_cut_and_that_is_said_once(
    family: str, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_warned", set())
    ours = family.startswith("open_clip")
    base, tokenizer = (open_clip_siglip(), OpenClipTokenizer()) if ours else clip(family)
    tokens: dict[str, Any] = {}
    for _ in range(2):
        tokens = towers.tokenize(base, tokenizer, ["a photo of a red."])
        towers.encode_texts(base, tokens)
    assert next(iter(tokens.values())).shape == (1, 16)
    said = [str(w.message) for w in recwarn if "is not causal" in str(w.message)]
    assert len(said) == 1


@pytest.mark.parametrize("name", ["transformers-clip", "open_clip-vit"])
@pytest.mark.parametrize(("count", "template"), [(5, "a photo of a {}."), (4, "{}"), (3, "the {}")])
def test_prompts_in_the_place_of_the_names_are_named(name: str, count: int, template: str) -> None:
    model, tokenizer = clip(name)
    model = graftune.wrap(model, "promptsrc", num_tokens_text=count, **SHALLOW)
    objective = ClassNameClassifier(list(COLOURS), tokenizer, ["a photo of a drawing {}", template])
    with pytest.raises(
        ValueError, match=r"tells 'red' from 'green': begin the template with a word"
    ):
        objective(model, torch.randn(2, 3, 32, 32))
    with model.disable_adapter():  # the frozen model reads them as they are
        assert objective(model, torch.randn(2, 3, 32, 32))["logits"].shape == (2, 4)


def test_more_prompts_than_positions_are_refused_for_open_clip_too() -> None:
    base = MODELS["open_clip-vit"].build()
    with pytest.raises(ValueError, match="give num_tokens_text of at most 14"):
        graftune.wrap(base, "promptsrc", num_tokens_text=20, **SHALLOW)
    graftune.wrap(base, "promptsrc", num_tokens_text=14, **SHALLOW)

"""Deep prompts against the towers run by hand, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import graftune
from graftune.adapters.prompts.deep import DeepPromptConfig
from support.clip import clip
from support.models import MODELS


def prompted(name: str, **fields: Any) -> nn.Module:
    """A model with prompts that are far from nothing."""
    settings: dict[str, Any] = {
        "num_tokens_text": 2,
        "num_tokens_vision": 3,
        "depth_text": 2,
        "depth_vision": 2,
        "init_text": None,
        "init_weights": False,
    }
    torch.manual_seed(0)
    return graftune.wrap(MODELS[name].build(), DeepPromptConfig(**{**settings, **fields}))


def of(model: nn.Module, part: str) -> Tensor:
    """The prompts of one tower: (blocks, n, D)."""
    return next(
        parameter
        for name, parameter in model.named_parameters()
        if "deep_prompt_tokens" in name and part in name
    )


@pytest.mark.parametrize(("depth", "blocks"), [(1, 2), (2, 2)])
def test_transformers_vision_tower_by_hand(depth: int, blocks: int) -> None:
    model = prompted("transformers-clip", depth_vision=depth)
    vision = model.get_base_model().vision_model
    tokens = of(model, "vision_model")
    assert tokens.shape == (depth, 3, 32)
    pixels = MODELS["transformers-clip"].batch()["pixel_values"]
    with torch.no_grad():
        result = vision(pixel_values=pixels)
        model.disable_adapter_layers()
        hidden = vision.embeddings(pixels)
        length = hidden.shape[1]
        hidden = torch.cat([hidden, tokens[0].expand(len(pixels), -1, -1)], 1)
        hidden = vision.pre_layrnorm(hidden)
        for number, block in enumerate(vision.encoder.layers):
            if 0 < number < depth:
                new = tokens[number].expand(len(pixels), -1, -1)
                hidden = torch.cat([hidden[:, :length], new], 1)
            hidden = block(hidden, attention_mask=None)
    assert len(vision.encoder.layers) == blocks
    torch.testing.assert_close(result.last_hidden_state, hidden[:, :length])
    pooled = vision.post_layernorm(hidden[:, 0])
    torch.testing.assert_close(result.pooler_output, pooled)


@pytest.mark.parametrize("depth", [1, 2])
def test_open_clip_text_tower_by_hand(depth: int) -> None:
    model = prompted("open_clip-vit", num_tokens_vision=0, depth_text=depth)
    base = model.get_base_model()
    tokens = of(model, "transformer")
    text = MODELS["open_clip-vit"].batch()["text"]
    with torch.no_grad():
        result = base.encode_text(text)
        model.disable_adapter_layers()
        hidden = base.token_embedding(text)
        hidden[:, 1:3] = tokens[0]
        hidden = hidden + base.positional_embedding
        for number, block in enumerate(base.transformer.resblocks):
            if 0 < number < depth:
                hidden[:, 1:3] = tokens[number]
            hidden = block(hidden, attn_mask=base.attn_mask)
        hidden = base.ln_final(hidden)
        pooled = hidden[torch.arange(len(text)), text.argmax(-1)] @ base.text_projection
    torch.testing.assert_close(result, pooled)


@pytest.mark.parametrize("name", ["transformers-clip", "transformers-siglip", "open_clip-vit"])
def test_one_tower_alone(name: str) -> None:
    case = MODELS[name]
    base, batch = case.build(), case.batch()

    def features(model: Any) -> tuple[Tensor, Tensor]:
        if name.startswith("open_clip"):
            return model.encode_image(batch["image"]), model.encode_text(batch["text"])
        image = model.get_image_features(pixel_values=batch["pixel_values"])
        return image.pooler_output, model.get_text_features(batch["input_ids"]).pooler_output

    with torch.no_grad():
        image, text = features(base)
        vision_only = features(prompted(name, num_tokens_text=0).get_base_model())
        text_only = features(prompted(name, num_tokens_vision=0).get_base_model())
    torch.testing.assert_close(vision_only[1], text)
    torch.testing.assert_close(text_only[0], image)
    assert (vision_only[0] - image).abs().max() > 1e-3
    assert (text_only[1] - text).abs().max() > 1e-3
    assert vision_only[0].shape == image.shape


def test_outputs_keep_their_shapes() -> None:
    case = MODELS["transformers-clip"]
    plain = case.build()(**case.batch(), output_hidden_states=True)
    model = prompted("transformers-clip")
    result = model(**case.batch(), output_hidden_states=True)
    for name in ("text_model_output", "vision_model_output"):
        ours, theirs = getattr(result, name), getattr(plain, name)
        assert ours.last_hidden_state.shape == theirs.last_hidden_state.shape
        assert [h.shape for h in ours.hidden_states] == [h.shape for h in theirs.hidden_states]


def test_the_first_prompts_start_as_words() -> None:
    base, tokenizer = clip()
    model = graftune.wrap(
        base,
        "promptsrc",
        tokenizer=tokenizer,
        depth_text=2,
        depth_vision=2,
        init_text="a photo of a",
    )
    tokens = of(model, "text_model")
    ids = tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    assert model.active_peft_config.init_token_ids == ids
    embedding = model.get_base_model().text_model.embeddings.token_embedding.weight
    torch.testing.assert_close(tokens[0], embedding[ids], rtol=0, atol=0)
    assert tokens[1].abs().max() < 0.2


def vit_b_16(library: str) -> nn.Module:
    """A CLIP of ViT-B/16's shapes, whose weights are whatever is in memory."""
    with torch.device("meta"):
        if library == "transformers":
            from transformers import CLIPConfig, CLIPModel

            model: nn.Module = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
        else:
            from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

            model = CLIP(512, CLIPVisionCfg(patch_size=16), CLIPTextCfg())
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_a_vit_b_16_has_the_numbers_of_the_paper(library: str, tmp_path: Any) -> None:
    model = graftune.wrap(vit_b_16(library), "promptsrc", init_text=None)
    assert model.get_nb_trainable_parameters()[0] == 46_080
    shapes = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    assert shapes == {(9, 4, 512), (9, 4, 768)}
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == 46_080  # noqa: SIM118
    written = sum(file.stat().st_size for file in tmp_path.glob("adapter_model*"))
    assert written <= 1.05 * 4 * 46_080 + 4096
    shallow = graftune.wrap(
        model.unload(), "promptsrc", init_text=None, depth_text=3, depth_vision=3
    )
    assert shallow.get_nb_trainable_parameters()[0] == 15_360


@pytest.mark.parametrize("name", ["transformers-clip", "open_clip-vit"])
def test_merging_says_why_it_cannot(name: str) -> None:
    model = prompted(name)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="prompts are tokens and not a change of the weights"):
            merge()
    assert model(**MODELS[name].batch())  # as it was
    assert not hasattr(model.unload(), "peft_config")


def test_one_adapter_at_a_time() -> None:
    model = prompted("transformers-clip")
    graftune.wrap(
        model, DeepPromptConfig(init_text=None, depth_text=1, depth_vision=1), adapter_name="b"
    )
    model.base_model.set_adapter(["default", "b"])
    case = MODELS["transformers-clip"]
    with pytest.raises(ValueError, match="one adapter at a time"):
        model(**case.batch())


def test_prompts_beside_an_adapter_of_the_weights_train_together() -> None:
    case = MODELS["transformers-clip"]
    flora = graftune.wrap(case.build(), "flora", r=2).get_base_model()
    model = graftune.wrap(
        flora, DeepPromptConfig(init_text=None, depth_text=2, depth_vision=2, num_tokens_text=2)
    )
    model(**case.batch()).logits_per_image.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"depth_text": 3}, ValueError, "the text tower has 2 blocks"),
        ({"depth_vision": 3}, ValueError, "the vision tower has 2 blocks"),
        (
            {"num_tokens_text": 15},
            ValueError,
            "give num_tokens_text of at most 14",
        ),
        ({"num_tokens_text": -1}, ValueError, "`num_tokens_text` must be a whole number"),
        ({"depth_text": 0, "num_tokens_vision": 0}, ValueError, "no prompts in either tower"),
        ({"init_token_ids": [1]}, ValueError, "1 ids for num_tokens_text=2"),
        ({"init_token_ids": [1, 64]}, ValueError, "the tokenizer belongs to another model"),
        ({"text_blocks": "text.blocks", "text_embedding": "x"}, ValueError, "no module of that"),
    ],
)
def test_bad_configs_are_refused_before_the_model_is_touched(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = MODELS["transformers-clip"].build()
    names = [name for name, _ in base.named_modules()]
    settings: dict[str, Any] = {"num_tokens_text": 2, "depth_text": 2, "depth_vision": 2}
    with pytest.raises(error, match=message):
        graftune.wrap(base, DeepPromptConfig(init_text=None, **{**settings, **fields}))
    assert [name for name, _ in base.named_modules()] == names
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize("name", ["open_clip-resnet", "transformers-llama", "transformers-vit"])
def test_a_missing_tower_is_named(name: str) -> None:
    missing = "vision" if name == "open_clip-resnet" else "text"
    with pytest.raises(ValueError, match=f"no {missing} tower of transformer blocks"):
        graftune.wrap(MODELS[name].build(), "promptsrc", init_text=None)


def test_words_of_another_number_are_refused() -> None:
    base, tokenizer = clip()
    with pytest.raises(ValueError, match="is 2 tokens and there are 4 text prompts"):
        graftune.wrap(base, "promptsrc", tokenizer=tokenizer, init_text="a photo")
    with pytest.raises(ValueError, match="give `tokenizer=`, or init_text=None"):
        graftune.wrap(clip()[0], "promptsrc")


def test_a_text_without_room_is_refused() -> None:
    model = prompted("transformers-clip", num_tokens_text=4)
    case = MODELS["transformers-clip"]
    batch = {**case.batch(), "input_ids": case.batch()["input_ids"][:, -4:]}
    with pytest.raises(ValueError, match="no place for 4 prompts from position 1 on"):
        model(**batch)


def test_mixed_batches_are_refused() -> None:
    model = prompted("transformers-clip")
    with pytest.raises(ValueError, match="`adapter_names` is not supported"):
        model(**MODELS["transformers-clip"].batch(), adapter_names=["default"] * 4)


def test_peft_users_name_the_modules() -> None:
    from peft import get_peft_model

    base = MODELS["transformers-clip"].build()
    with pytest.raises(ValueError, match="needs text_embedding, text_blocks, vision_entry"):
        get_peft_model(base, DeepPromptConfig())
    config = DeepPromptConfig(
        num_tokens_text=0,
        depth_vision=1,
        vision_entry="vision_model.pre_layrnorm",
        vision_blocks="vision_model.encoder.layers",
    )
    assert get_peft_model(base, config).get_nb_trainable_parameters()[0] == 4 * 32

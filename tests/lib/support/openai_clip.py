"""A tiny CLIP in OpenAI's format: weights by OpenAI's names, and both libraries' models of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]

WIDTH, HEADS, BLOCKS, EMBEDDING = 32, 4, 3, 24
VOCABULARY, CONTEXT, IMAGE, PATCH = 64, 16, 32, 8


def weights(seed: int = 0) -> Weights:
    """Random weights in float64, none of them near nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def norm(name: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", 1 + draw(WIDTH, scale=0.2)
        yield f"{name}.bias", draw(WIDTH, scale=0.2)

    def linear(name: str, out: int, inner: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", draw(out, inner, scale=inner**-0.5)
        yield f"{name}.bias", draw(out, scale=0.2)

    def blocks(tower: str) -> Iterator[tuple[str, Tensor]]:
        for number in range(BLOCKS):
            block = f"{tower}transformer.resblocks.{number}"
            yield from norm(f"{block}.ln_1")
            yield f"{block}.attn.in_proj_weight", draw(3 * WIDTH, WIDTH, scale=WIDTH**-0.5)
            yield f"{block}.attn.in_proj_bias", draw(3 * WIDTH, scale=0.2)
            yield from linear(f"{block}.attn.out_proj", WIDTH, WIDTH)
            yield from norm(f"{block}.ln_2")
            yield from linear(f"{block}.mlp.c_fc", 4 * WIDTH, WIDTH)
            yield from linear(f"{block}.mlp.c_proj", WIDTH, 4 * WIDTH)

    def every() -> Iterator[tuple[str, Tensor]]:
        yield "visual.class_embedding", draw(WIDTH, scale=0.5)
        yield "visual.positional_embedding", draw((IMAGE // PATCH) ** 2 + 1, WIDTH, scale=0.5)
        yield "visual.conv1.weight", draw(WIDTH, 3, PATCH, PATCH, scale=0.1)
        yield from norm("visual.ln_pre")
        yield from blocks("visual.")
        yield from norm("visual.ln_post")
        yield "visual.proj", draw(WIDTH, EMBEDDING, scale=WIDTH**-0.5)
        yield "token_embedding.weight", draw(VOCABULARY, WIDTH, scale=0.5)
        yield "positional_embedding", draw(CONTEXT, WIDTH, scale=0.5)
        yield from blocks("")
        yield from norm("ln_final")
        yield "text_projection", draw(WIDTH, EMBEDDING, scale=WIDTH**-0.5)
        yield "logit_scale", torch.tensor(2.5, dtype=torch.float64)

    return dict(every())


def of_open_clip(given: Weights) -> nn.Module:
    """open_clip's model, whose own names are OpenAI's."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=BLOCKS, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=IMAGE
    )
    text = CLIPTextCfg(
        context_length=CONTEXT, vocab_size=VOCABULARY, width=WIDTH, heads=HEADS, layers=BLOCKS
    )
    model = CLIP(EMBEDDING, vision, text, quick_gelu=True).double()
    model.load_state_dict(given)
    return model.eval()


def of_transformers(given: Weights) -> nn.Module:
    """transformers' model."""
    from transformers import CLIPConfig, CLIPModel

    shared: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "hidden_act": "quick_gelu",
    }
    config = CLIPConfig(
        text_config={
            **shared,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
            "eos_token_id": VOCABULARY - 1,
        },
        vision_config={**shared, "image_size": IMAGE, "patch_size": PATCH},
        projection_dim=EMBEDDING,
    )
    model = CLIPModel(config).double()
    missing, unexpected = model.load_state_dict(_renamed(given), strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    return model.eval()


LIBRARIES = {"transformers": of_transformers, "open_clip": of_open_clip}


_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OTHERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}


def _renamed(given: Weights) -> Weights:
    """The weights by transformers' names."""
    found: Weights = {
        "visual_projection.weight": given["visual.proj"].T,
        "text_projection.weight": given["text_projection"].T,
    }
    for name, value in given.items():
        if "resblocks" in name:
            tower, _, rest = name.rpartition("transformer.resblocks.")
            number, _, inner = rest.partition(".")
            start = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            found |= _of_block(start, inner, value)
            continue
        for old, new in _OTHERS.items():
            if name == old or name.startswith(f"{old}."):
                found[new + name.removeprefix(old)] = value
    return found


def _of_block(start: str, inner: str, value: Tensor) -> Weights:
    module, _, kind = inner.rpartition(".")
    if module == "attn":
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{start}.self_attn.{p}_proj.{kind.removeprefix('in_proj_')}": v for p, v in parts}
    return {f"{start}.{_BLOCK[module]}.{kind}": value}

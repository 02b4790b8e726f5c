"""PromptSRC written down once more, from the paper and on bare tensors, for tests to compare with.

Nothing here calls a model, an adapter or a regularizer; weights are in OpenAI's format
(`support.openai_clip`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from support.openai_clip import BLOCKS, HEADS, PATCH, Weights

Prompts = dict[str, Tensor]  # "text" and "vision", each (depth, n, width)


@dataclass(frozen=True)
class Reference:
    """What one training step computes.

    Args:
        image, text: features of length one with prompts, (B, D) and (C, D).
        logits: with prompts, (B, C).
        terms: cross entropy and the three terms of self-regulation, weighted.
    """

    image: Tensor
    text: Tensor
    logits: Tensor
    terms: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        return sum(self.terms.values(), start=torch.zeros((), dtype=torch.float64))


def image_features(weights: Weights, pixels: Tensor, prompts: Tensor | None) -> Tensor:
    """Features of images, not of length one: (B, 3, H, W) to (B, D)."""
    patches = torch.nn.functional.conv2d(pixels, weights["visual.conv1.weight"], stride=PATCH)
    tokens = patches.flatten(2).transpose(1, 2)  # (B, P², W)
    first = weights["visual.class_embedding"].expand(len(pixels), 1, -1)
    hidden = torch.cat([first, tokens], 1) + weights["visual.positional_embedding"]
    length = hidden.shape[1]
    if prompts is not None:
        hidden = torch.cat([hidden, _each(prompts[0], hidden)], 1)
    hidden = _norm(weights, "visual.ln_pre", hidden)
    for number in range(BLOCKS):
        if prompts is not None and 0 < number < len(prompts):
            hidden = torch.cat([hidden[:, :length], _each(prompts[number], hidden)], 1)
        hidden = _block(weights, f"visual.transformer.resblocks.{number}", hidden, None)
    return _norm(weights, "visual.ln_post", hidden[:, 0]) @ weights["visual.proj"]


def text_features(weights: Weights, tokens: Tensor, prompts: Tensor | None) -> Tensor:
    """Features of texts, not of length one: (T, L) to (T, D); the highest id ends a text."""
    hidden = weights["token_embedding.weight"][tokens]
    if prompts is not None:
        hidden = _replaced(hidden, prompts[0])
    length = tokens.shape[1]
    hidden = hidden + weights["positional_embedding"][:length]
    mask = torch.full((length, length), -math.inf, dtype=hidden.dtype).triu(1)
    for number in range(BLOCKS):
        if prompts is not None and 0 < number < len(prompts):
            hidden = _replaced(hidden, prompts[number])
        hidden = _block(weights, f"transformer.resblocks.{number}", hidden, mask)
    hidden = _norm(weights, "ln_final", hidden)
    ends = hidden[torch.arange(len(tokens)), tokens.argmax(-1)]
    return ends @ weights["text_projection"]


def step(
    weights: Weights,
    prompts: Prompts,
    pixels: Tensor,
    labels: Tensor,
    tokens: Tensor,
    frozen_tokens: Sequence[Tensor],
) -> Reference:
    """One step's numbers.

    Args:
        weights: of the frozen model.
        prompts: those of the towers that have some.
        pixels: (B, 3, H, W).
        labels: (B,).
        tokens: the class texts, (C, L).
        frozen_tokens: the class texts in each template of the textual diversity, each (C, L).
    """
    scale = weights["logit_scale"].exp()
    frozen_text = torch.stack([text_features(weights, t, None) for t in frozen_tokens]).mean(0)
    frozen_text = _unit(frozen_text)
    frozen_image = _unit(image_features(weights, pixels, None))
    frozen_logits = scale * frozen_image @ frozen_text.T
    image = _unit(image_features(weights, pixels, prompts.get("vision")))
    text = _unit(text_features(weights, tokens, prompts.get("text")))
    logits = scale * image @ text.T
    student, teacher = logits.log_softmax(1), frozen_logits.log_softmax(1)
    terms = {
        "task": -student[torch.arange(len(labels)), labels].mean(),
        "text": 25 * (text - frozen_text).abs().mean(),
        "image": 10 * (image - frozen_image).abs().mean(),
        "logits": (teacher.exp() * (teacher - student)).sum() / logits.numel(),
    }
    return Reference(image, text, logits, terms)


def _block(weights: Weights, name: str, hidden: Tensor, mask: Tensor | None) -> Tensor:
    hidden = hidden + _attention(weights, name, _norm(weights, f"{name}.ln_1", hidden), mask)
    inner = _linear(weights, f"{name}.mlp.c_fc", _norm(weights, f"{name}.ln_2", hidden))
    inner = inner * torch.sigmoid(1.702 * inner)
    return hidden + _linear(weights, f"{name}.mlp.c_proj", inner)


def _attention(weights: Weights, name: str, hidden: Tensor, mask: Tensor | None) -> Tensor:
    count, length, width = hidden.shape
    packed = hidden @ weights[f"{name}.attn.in_proj_weight"].T
    packed = packed + weights[f"{name}.attn.in_proj_bias"]
    query, key, value = (
        part.reshape(count, length, HEADS, -1).transpose(1, 2) for part in packed.chunk(3, -1)
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(width // HEADS)
    if mask is not None:
        scores = scores + mask
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(count, length, width)
    return _linear(weights, f"{name}.attn.out_proj", mixed)


def _linear(weights: Weights, name: str, hidden: Tensor) -> Tensor:
    return hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, hidden: Tensor) -> Tensor:
    centred = hidden - hidden.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _replaced(hidden: Tensor, prompts: Tensor) -> Tensor:
    """Positions 1 to n, behind the start of text."""
    after = hidden[:, 1 + len(prompts) :]
    return torch.cat([hidden[:, :1], _each(prompts, hidden), after], 1)


def _each(prompts: Tensor, hidden: Tensor) -> Tensor:
    return prompts.expand(len(hidden), -1, -1)


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)

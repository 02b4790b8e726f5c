"""Models with an image tower and a text tower: what transformers and open_clip do differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from graftune.integrations.libraries.text_cut import cut_after_end, say_not_cut
from graftune.integrations.objectives.unwrap import base_of

_TEXTS_AT_A_TIME = 512

# Trained with texts padded to one length and no attention mask: padding is part of these models.
_PADDED_TO_FULL_LENGTH = {"siglip", "siglip2"}


@dataclass(frozen=True)
class JointOutput:
    """What one forward pass over B images and T texts returned.

    Args:
        logits: the model's own image-by-text logits, (B, T).
        image_features: image features of length one, (B, D).
        text_features: text features of length one, (T, D).
        logit_bias: what was added to every logit; None where the model has no bias.
    """

    logits: torch.Tensor
    image_features: torch.Tensor
    text_features: torch.Tensor
    logit_bias: torch.Tensor | None


def is_transformers(base: nn.Module) -> bool:
    """Tell a transformers model with two towers from one of open_clip.

    Raises:
        TypeError: the model is neither.
    """
    if hasattr(base, "get_image_features") and hasattr(base, "get_text_features"):
        return True
    if hasattr(base, "encode_image") and hasattr(base, "encode_text"):
        return False
    raise TypeError(
        f"{type(base).__name__} has no image tower beside a text tower; give a CLIP or SigLIP "
        "model of transformers (CLIPModel, SiglipModel, AutoModel.from_pretrained) or of open_clip"
    )


def tokenize(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tokenize texts into the keyword arguments that the model takes beside its images.

    Texts are padded to the longest of them where that gives the same features as padding to the
    full length: a causal text tower that pools at the end of the text never looks at its padding.

    Args:
        model: a model with two towers, wrapped or not.
        tokenizer: a transformers tokenizer or processor, or an open_clip tokenizer.
        texts: T texts.

    Returns:
        Integer tensors of shape (T, length).

    Raises:
        ValueError: a text has more tokens than the model has positions.
        TypeError: the tokenizer belongs to another library than the model, or the model takes more
            than pixels.
    """
    base = base_of(model)
    if is_transformers(base):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if is_transformers(base) != isinstance(tokenizer, PreTrainedTokenizerBase):
        given = "transformers" if is_transformers(base) else "open_clip"
        raise TypeError(
            f"{type(base).__name__} is a model of {given}, {type(tokenizer).__name__} is not a "
            "tokenizer for it; use AutoProcessor.from_pretrained(...) with transformers and "
            "open_clip.get_tokenizer(...) with open_clip"
        )
    if not is_transformers(base):
        return {"text": _tokenize_at_full_length(base, tokenizer, list(texts))}
    _check_pixels_are_enough(base)
    text_config = base.config.text_config
    most = getattr(text_config, "max_position_embeddings", tokenizer.model_max_length)
    full = base.config.model_type in _PADDED_TO_FULL_LENGTH
    padding = {"padding": "max_length", "max_length": most} if full else {"padding": "longest"}
    if full:
        say_not_cut(base)
    tokens = dict(tokenizer(list(texts), return_tensors="pt", **padding))
    if tokens["input_ids"].shape[1] > most:
        longest = max(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
        raise ValueError(
            f"{longest!r} has {len(tokenizer(longest)['input_ids'])} tokens, the model takes at "
            f"most {most}; shorten the class name or the template"
        )
    tokens.pop("token_type_ids", None)
    return tokens


def _tokenize_at_full_length(base: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Tokens for a text tower of open_clip, which adds all positions at once: (T, length)."""
    length = getattr(base, "context_length", None)
    ids: torch.Tensor = tokenizer(texts, context_length=length)
    # What is too long is cut off in silence; a text that is cut has no padding at its end.
    full = (ids[:, -1] != ids[:, -2]).nonzero().flatten().tolist()
    if length is not None and full:
        longer = tokenizer([texts[row] for row in full], context_length=length + 1)
        wrong = (longer[:, :length] != ids[full]).any(1).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{texts[full[wrong[0]]]!r} has more than the {length} tokens that the model "
                "takes; shorten the class name or the template"
            )
    return ids


def _check_pixels_are_enough(base: Any) -> None:
    if base.config.model_type == "siglip2":
        raise TypeError(
            f"{type(base).__name__} takes patches with a mask and their shapes, and this objective "
            "has only pixels for it; use a SigLIP2 of fixed resolution, which is a SiglipModel"
        )


def joint_forward(
    model: nn.Module, tokens: Mapping[str, torch.Tensor], pixel_values: torch.Tensor
) -> JointOutput:
    """Call the model once, through every wrapper around it, on all images and all texts.

    Args:
        model: a model with two towers, wrapped or not.
        tokens: what `tokenize` returned, on the model's device.
        pixel_values: B preprocessed images, (B, channels, height, width).
    """
    base = base_of(model)
    if is_transformers(base):
        output = model(pixel_values=pixel_values, **tokens)
        bias = getattr(base, "logit_bias", None)
        return JointOutput(output.logits_per_image, output.image_embeds, output.text_embeds, bias)
    with cut_after_end(model, base, tokens["text"]):
        output = model(image=pixel_values, **tokens)
    if isinstance(output, dict):
        image, text = output["image_features"], output["text_features"]
        scale, bias = output["logit_scale"], output.get("logit_bias")
    else:
        image, text, scale, bias = (*output, None)[:4]
    logits = scale * image @ text.T
    return JointOutput(logits if bias is None else logits + bias, image, text, bias)


def encode_texts(
    model: nn.Module, tokens: Mapping[str, torch.Tensor], normalize: bool = True
) -> torch.Tensor:
    """Return the features of T texts, of length one unless asked otherwise: (T, D).

    For inference: passes wrappers by, and takes a few hundred texts at a time.
    """
    base = base_of(model)
    parts = []
    for start in range(0, len(next(iter(tokens.values()))), _TEXTS_AT_A_TIME):
        part = {k: v[start : start + _TEXTS_AT_A_TIME] for k, v in tokens.items()}
        if is_transformers(base):
            features = base.get_text_features(**part)
        else:
            with cut_after_end(model, base, part["text"]):
                features = base.encode_text(part["text"])
        parts.append(getattr(features, "pooler_output", features))
    features = torch.cat(parts)
    return nn.functional.normalize(features, dim=-1) if normalize else features


def encode_images(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the features of B images, of length one: (B, D). For inference: passes wrappers by."""
    base = base_of(model)
    if is_transformers(base):
        features = base.get_image_features(pixel_values=pixel_values)
    else:
        features = base.encode_image(pixel_values)
    return nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)


def logits_of(model: nn.Module, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return exp(logit_scale) · images · textsᵀ + logit_bias: (B, D) and (T, D) to (B, T)."""
    base = base_of(model)
    logits = base.logit_scale.exp() * images @ texts.T
    bias = getattr(base, "logit_bias", None)
    return logits if bias is None else logits + bias

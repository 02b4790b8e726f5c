"""What a CLIP says of generated images: features to compare by, and how they fit their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftune.integrations.libraries.towers import encode_images, encode_texts, tokenize

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGES_AT_A_TIME = 128


class ClipImageFeatures(nn.Module):
    """Image features of a CLIP, of length √D, for distances between sets of images.

    Inception's features have to be downloaded and know photographs; a CLIP's know what is said of
    pictures (Kynkäänniemi et al., arXiv 2203.06026, section 5). At the length √D a component's mean
    square is one, which is what the kernel distance's scale of 1/D is made for.

    Args:
        model: a CLIP of transformers.
        processor: its processor.

    Example:
        >>> features = ClipImageFeatures(CLIPModel.from_pretrained(ID), processor)
        >>> image_distances(generated, real, features)["fid"]
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.num_features = int(model.config.projection_dim)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, D) of images (N, 3, height, width) in 0..255."""
        return self.num_features**0.5 * self.directions(list(images))

    @torch.no_grad()
    def directions(self, images: Sequence[Any]) -> Tensor:
        """Return features of length one, (N, D), of images as the processor takes them."""
        device = next(self.model.parameters()).device
        parts = []
        for start in range(0, len(images), _IMAGES_AT_A_TIME):
            some = list(images[start : start + _IMAGES_AT_A_TIME])
            pixels = self.processor(images=some, return_tensors="pt")["pixel_values"]
            parts.append(encode_images(self.model, pixels.to(device)))
        return torch.cat(parts)


@torch.no_grad()
def clip_score(images: Sequence[Image], texts: Sequence[str], features: ClipImageFeatures) -> float:
    """Return how well images fit their texts: the mean of 100 · max(cos(image, text), 0).

    CLIPScore (Hessel et al., arXiv 2104.08718, section 3) with the weight 100, as papers about
    generation print it; 0 to 100, higher is better.

    Args:
        images: N of them.
        texts: one for each image.
        features: of the CLIP that is asked.

    Raises:
        ValueError: other numbers of images and texts, or none.
    """
    if len(images) != len(texts) or not texts:
        raise ValueError(f"one text an image, at least one: got {len(images)} and {len(texts)}")
    device = next(features.model.parameters()).device
    tokens = tokenize(features.model, features.processor, list(texts))
    told = encode_texts(features.model, {name: part.to(device) for name, part in tokens.items()})
    cosines = (features.directions(images) * told).sum(1)  # (N,)
    return 100 * cosines.clamp(min=0).mean().item()


@torch.no_grad()
def picture_agreement(
    images: Sequence[Image], others: Sequence[Image], features: ClipImageFeatures
) -> float:
    """Return how alike images are, pair by pair: the mean of 100 · cos(image, other).

    Of what a model draws before and after fine-tuning, with the same texts and noise, it says how
    much stayed: 100 is everything.

    Args:
        images: N of them.
        others: as many.
        features: of the CLIP that is asked.

    Raises:
        ValueError: other numbers of images and others, or none.
    """
    if len(images) != len(others) or not images:
        raise ValueError(f"pairs of images, at least one: got {len(images)} and {len(others)}")
    pairs = features.directions(images) * features.directions(others)
    return 100 * pairs.sum(1).mean().item()

"""Pictures as the samples of a denoiser, with what it is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from graftune.cli.errors import UsageError
from graftune.integrations.data import open_image
from graftune.integrations.extras import require
from graftune.integrations.libraries.base_models import BaseModel

_ENCODED_AT_ONCE = 8  # pictures


def as_sample(picture: Any, size: tuple[int, int], channels: int) -> Tensor:
    """Return the middle of a picture as a tensor from −1 to 1: (channels, height, width).

    Args:
        picture: see `graftune.integrations.data.open_image`.
        size: height and width.
        channels: 1 for grey, 3 for colours.
    """
    operations = require("PIL.ImageOps")
    image = open_image(picture).convert("L" if channels == 1 else "RGB")
    height, width = size
    values = np.asarray(operations.fit(image, (width, height)), dtype=np.float32)
    values = values.reshape(height, width, channels)
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)


class Samples(Dataset):
    """Pictures with classes as a denoiser's samples: pixels, or a VAE's latents.

    The conditions follow from the model: the class's number where it embeds classes, the features
    of the class's text where the pipeline has a text encoder, else none. Latents are the means of
    the VAE's distributions, times its scale; they are computed once and kept in memory.

    Args:
        rows: pictures with the columns "image" and "label".
        base: a denoiser with the parts of its pipeline.
        template: texts with `{}` for the class's name; the first is used.
        device: where the VAE and the text encoder compute.

    Raises:
        ValueError: the model takes samples or conditions that do not follow from pictures and
            classes.
    """

    def __init__(
        self, rows: Any, base: BaseModel, template: Sequence[str], device: torch.device
    ) -> None:
        self.rows = rows
        self._channels, self._size = _shape(base)
        names = rows.features["label"].names
        self.settings, self._conditions = _conditions(base, names, template, device)
        vae = base.parts.get("vae")
        self._latents = None if vae is None else self._encode(vae, device)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        label = self.rows[index]["label"]
        sample = self._pixels(index) if self._latents is None else self._latents[index]
        return {"sample": sample, **(self._conditions[label] if self._conditions else {})}

    @staticmethod
    def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return a batch: (B, ...) of each."""
        return default_collate(list(rows))

    def _pixels(self, index: int) -> Tensor:
        return as_sample(self.rows[index]["image"], self._size, self._channels)

    @torch.no_grad()
    def _encode(self, vae: Any, device: torch.device) -> list[Tensor]:
        vae.to(device)
        latents: list[Tensor] = []
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        for start in range(0, len(self), _ENCODED_AT_ONCE):
            indices = range(start, min(start + _ENCODED_AT_ONCE, len(self)))
            pixels = torch.stack([self._pixels(index) for index in indices])
            means = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode()
            latents += ((means - shift) * vae.config.scaling_factor).float().cpu()
        return latents


def _shape(base: BaseModel) -> tuple[int, tuple[int, int]]:
    """Return channels, height and width of the pictures that become samples of the model."""
    config: Any = base.model.config
    vae = base.parts.get("vae")
    size = config.sample_size
    if size is None:
        raise UsageError(f"{type(base.model).__name__} does not say the size of its samples")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if vae is not None:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return vae.config.in_channels, (height * factor, width * factor)
    if config.in_channels not in (1, 3):
        raise UsageError(
            f"{type(base.model).__name__} takes samples of {config.in_channels} channels, and its "
            "pipeline has no VAE that makes them of pictures"
        )
    return config.in_channels, (height, width)


def _conditions(
    base: BaseModel, names: Sequence[str], template: Sequence[str], device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Return settings to record, and for each class what the model is conditioned on."""
    config: Any = base.model.config
    embedded = getattr(config, "num_class_embeds", None) or getattr(
        config, "num_embeds_ada_norm", None
    )
    if "text_encoder" in base.parts:
        texts = [template[0].replace("{}", name.replace("_", " ")) for name in names]
        return {"template": template[0]}, _encoded(base, texts, device)
    if embedded:
        if embedded < len(names):
            raise UsageError(f"the model knows {embedded} classes, the data have {len(names)}")
        numbers = [{"class_labels": torch.tensor(number)} for number in range(len(names))]
        return {"class_names": list(names)}, numbers
    if getattr(config, "cross_attention_dim", None) and "Condition" in type(base.model).__name__:
        raise UsageError(
            f"{type(base.model).__name__} is conditioned on features of texts, and its pipeline "
            "has no text encoder"
        )
    return {}, []


@torch.no_grad()
def _encoded(
    base: BaseModel, texts: Sequence[str], device: torch.device
) -> list[dict[str, Tensor]]:
    encoder = base.parts["text_encoder"].to(device)
    tokens = base.tokenizer(
        list(texts),
        padding="max_length",
        max_length=base.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    features = encoder(tokens["input_ids"].to(device))[0].float().cpu()  # (C, L, D)
    return [{"encoder_hidden_states": feature} for feature in features]

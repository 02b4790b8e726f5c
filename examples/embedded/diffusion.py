"""A small diffusion model: a UNet that draws emoji in one style from their names.

`python examples/pretraining/pretrain_unet.py --state STATE` makes its weights, in `unet/` here.

    from embedded.diffusion import load_pipeline

    pipeline = load_pipeline()
    pictures = pipeline(["red apple", "tiger"], seeds=[0, 1])      # PIL, 48 × 48

It is a `diffusers.DiffusionPipeline` with an ordinary `UNet2DConditionModel`, `DDPMScheduler`, and
the text tower and tokenizer of the embedded CLIP. The UNet works on pixels, three by three of them
as channels: 16 × 16 × 27.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizerFast

from embedded.model import CLIP
from embedded.pictures import Style, load_style

UNET = Path(__file__).resolve().parent / "unet"
STYLE = "fluent-emoji-flat"  # what it was pretrained on
CATEGORIES = ("Animals & Nature", "Food & Drink")
BLOCK = 3  # pixels a side that become channels
TOKENS = 12  # of a text, padded


def drawn(style: str = STYLE) -> tuple[np.ndarray, list[str]]:
    """Return pictures (N, 48, 48, 3) of the categories that the UNet knows, with their names."""
    found: Style = load_style(style)
    rows = [i for i, emoji in enumerate(found.emoji) if emoji.category in CATEGORIES]
    return found.images[rows], [found.emoji[i].name for i in rows]


def to_samples(images: np.ndarray) -> Tensor:
    """Return pictures (N, 48, 48, 3) in uint8 as the UNet's samples in -1..1: (N, 27, 16, 16)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.pixel_unshuffle(pixels, BLOCK)


def to_images(samples: Tensor) -> np.ndarray:
    """Return samples (N, 27, 16, 16) as pictures (N, 48, 48, 3) in uint8."""
    pixels = F.pixel_shuffle(samples, BLOCK).clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Put pictures of one size into one, row by row."""
    width, height = images[0].width + gap, images[0].height + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * width, place // columns * height))
    return sheet


@torch.no_grad()
def encode_texts(text_encoder: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the text tower's states: (N, 12, 128)."""
    ids = tokenizer(
        list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )["input_ids"]
    return text_encoder(ids.to(text_encoder.device)).last_hidden_state


class EmojiPipeline(DiffusionPipeline):
    """Draw emoji from their names.

    Args:
        unet: predicts the velocity of noised samples, given texts.
        scheduler: the noising that it was trained with.
        text_encoder: the text tower of the embedded CLIP.
        tokenizer: its tokenizer.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizerFast,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )

    @torch.no_grad()
    def __call__(
        self,
        names: Sequence[str],
        seeds: Sequence[int] | None = None,
        steps: int = 30,
        guidance: float = 1.0,
        batch: int = 64,
    ) -> list[Image.Image]:
        """Return one picture a name.

        Args:
            names: what to draw.
            seeds: of the noise, one a name; None: 0, 1, 2, ...
            steps: of the sampler, DDIM.
            guidance: how far to go beyond the prediction without a text; 1 is the prediction with
                it, and best here: the model knows each of its pictures by name.
            batch: pictures at once.
        """
        seeds = range(len(names)) if seeds is None else seeds
        samples = []
        for start in range(0, len(names), batch):
            part = slice(start, start + batch)
            noise = torch.stack([_noise(seed) for seed in seeds[part]]).to(self.unet.device)
            samples.append(self._denoise(noise, names[part], steps, guidance))
        return [Image.fromarray(image) for image in to_images(torch.cat(samples))]

    def _denoise(
        self, samples: Tensor, names: Sequence[str], steps: int, guidance: float
    ) -> Tensor:
        sampler = DDIMScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(steps, device=samples.device)
        asked = list(names) if guidance == 1 else [*names, *[""] * len(names)]
        texts = encode_texts(self.text_encoder, self.tokenizer, asked).to(samples.dtype)
        for t in self.progress_bar(sampler.timesteps):
            both = samples.repeat(len(asked) // len(names), 1, 1, 1)
            told, *untold = self.unet(both, t, encoder_hidden_states=texts).sample.split(len(names))
            velocity = torch.lerp(untold[0], told, guidance) if untold else told
            samples = sampler.step(velocity, t, samples).prev_sample
        return samples


def _noise(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3 * BLOCK**2, 16, 16, generator=generator)


def load_pipeline(folder: Path = UNET) -> EmojiPipeline:
    """The pretrained pipeline in float32, without a progress bar."""
    text_encoder = CLIPTextModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    pipeline = EmojiPipeline(
        UNet2DConditionModel.from_pretrained(folder).float().eval(),
        DDPMScheduler.from_pretrained(folder),
        text_encoder,
        CLIPTokenizerFast.from_pretrained(CLIP),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

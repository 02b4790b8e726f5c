"""The diffusion task: teach the embedded UNet a style that it has never seen, by a few words.

    from embedded.styles import new_text, style_task

    task = style_task(seed=0)
    task.train.names, task.train.images      # emoji in the new style
    new_text("tiger")                        # "line art of tiger": the text to draw them by

The base model draws "tiger" in the style of its pretraining. Fine-tuned on pictures in `openmoji`
by texts such as "line art of tiger" it shall draw those so, also of emoji that were not among them,
and go on drawing "tiger" as before. Man, woman and person variants of an emoji are never split over
training, validation and test.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from embedded.diffusion import STYLE, EmojiPipeline, drawn, encode_texts, to_samples
from embedded.pictures import FAR, load_style

TEMPLATE = "line art of {}"
SHARES = (0.4, 0.2, 0.4)  # of training, validation, test


@dataclass(frozen=True)
class Part:
    """Emoji: their names, and their pictures in the new style and in the old."""

    names: list[str]
    images: list[Image.Image]
    old_images: list[Image.Image]


@dataclass(frozen=True)
class StyleTask:
    """What is trained on, and what is drawn to choose settings and to report."""

    seed: int
    train: Part
    validation: Part
    test: Part


def new_text(name: str) -> str:
    """Return the text by which an emoji is drawn in the new style."""
    return TEMPLATE.format(name)


def style_task(seed: int = 0, style: str = FAR) -> StyleTask:
    """Divide the emoji of the pretraining, in another style, by a seed."""
    new, old = drawn(style), drawn(STYLE)
    old_row = {name: row for row, name in enumerate(old[1])}
    group = {emoji.name: emoji.group for emoji in load_style(style).emoji}
    rows = [row for row, name in enumerate(new[1]) if name in old_row]
    groups = sorted({group[new[1][row]] for row in rows})
    random.Random(seed).shuffle(groups)
    first, second = (round(sum(SHARES[:count]) * len(groups)) for count in (1, 2))

    def part(chosen: list[str]) -> Part:
        kept = [row for row in rows if group[new[1][row]] in chosen]
        names = [new[1][row] for row in kept]
        pictures = [Image.fromarray(new[0][row]) for row in kept]
        return Part(names, pictures, [Image.fromarray(old[0][old_row[name]]) for name in names])

    return StyleTask(seed, part(groups[:first]), part(groups[first:second]), part(groups[second:]))


def training_rows(
    pipeline: EmojiPipeline, images: list[Image.Image], texts: list[str]
) -> list[dict[str, Tensor]]:
    """Return pictures as samples (27, 16, 16) with their texts' states (12, 128)."""
    samples = to_samples(np.stack([np.asarray(image) for image in images]))
    states = encode_texts(pipeline.text_encoder, pipeline.tokenizer, texts)
    return [
        {"sample": sample, "encoder_hidden_states": state}
        for sample, state in zip(samples, states, strict=True)
    ]

"""The diffusion task: teach the embedded UNet a style that it has never seen, by a few words.

    from embedded.styles import TEMPLATE, style_task

    task = style_task(seed=0)
    task.train.names, task.train.images      # emoji in the new style
    TEMPLATE.format("tiger")                 # "line art of tiger": the text to draw them by

The base model draws "tiger" in the style of its pretraining. Fine-tuned on a few pictures in
`openmoji` by texts such as "line art of tiger" it shall draw those so, and go on drawing other
emoji by their names alone as before. Man, woman and person variants of an emoji are never split
over training, validation and test.
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
TRAINED = 24  # pictures


@dataclass(frozen=True)
class Part:
    """Emoji: their names, and their pictures in the new style and in the old."""

    names: list[str]
    images: list[Image.Image]
    old_images: list[Image.Image]


@dataclass(frozen=True)
class StyleTask:
    """What is trained on, and what shall stay: of it some to choose settings, some to report."""

    seed: int
    train: Part
    validation: Part
    test: Part


def style_task(seed: int = 0, trained: int = TRAINED) -> StyleTask:
    """Divide the pretraining's emoji by a seed: `trained` of them, and halves of the others."""
    new, old = drawn(FAR), drawn(STYLE)
    row_of = {name: row for row, name in enumerate(old[1])}
    group = {emoji.name: emoji.group for emoji in load_style(FAR).emoji}
    rows = [row for row, name in enumerate(new[1]) if name in row_of]
    order = sorted({group[new[1][row]] for row in rows})
    random.Random(seed).shuffle(order)
    rows.sort(key=lambda row: order.index(group[new[1][row]]))
    chosen = {group[new[1][row]] for row in rows[:trained]}
    others = [row for row in rows if group[new[1][row]] not in chosen]
    half = {group[new[1][row]] for row in others[: len(others) // 2]}
    return StyleTask(
        seed,
        _part([row for row in rows if group[new[1][row]] in chosen][:trained], new, old, row_of),
        _part([row for row in others if group[new[1][row]] in half], new, old, row_of),
        _part([row for row in others if group[new[1][row]] not in half], new, old, row_of),
    )


Pictures = tuple[np.ndarray, list[str]]


def _part(rows: list[int], new: Pictures, old: Pictures, row_of: dict[str, int]) -> Part:
    names = [new[1][row] for row in rows]
    return Part(
        names,
        [Image.fromarray(new[0][row]) for row in rows],
        [Image.fromarray(old[0][row_of[name]]) for name in names],
    )


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

"""The texts that pictures are paired with: names in templates, and subcategories."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run as files, not modules

from embedded.pictures import Emoji, all_emoji, subcategory_text

TEMPLATES = (
    "{}",
    "a picture of {}",
    "a picture of a {}",
    "a photo of {}",
    "a photo of a {}",
    "an emoji of {}",
    "{} emoji",
    "a drawing of a {}",
    "an icon of a {}",
    "a cartoon of a {}",
)
# Prompt-learning papers describe a class by many templates: the text tower should know them too.
RARE_TEMPLATES = (
    "a bad photo of a {}",
    "a photo of many {}",
    "a sculpture of a {}",
    "a photo of the hard to see {}",
    "a low resolution photo of the {}",
    "a rendering of a {}",
    "graffiti of a {}",
    "a bad photo of the {}",
    "a cropped photo of the {}",
    "a tattoo of a {}",
    "the embroidered {}",
    "a photo of a hard to see {}",
    "a bright photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a drawing of the {}",
    "a photo of my {}",
    "the plastic {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a black and white photo of the {}",
    "a painting of the {}",
    "a painting of a {}",
    "a pixelated photo of the {}",
    "a plastic {}",
    "a photo of the dirty {}",
    "a jpeg corrupted photo of a {}",
    "a blurry photo of the {}",
    "a photo of the {}",
    "a good photo of the {}",
    "the {} in a video game",
    "a photo of one {}",
    "a doodle of a {}",
    "the origami {}",
    "a sketch of a {}",
    "a low resolution photo of a {}",
    "the toy {}",
    "a rendition of the {}",
    "a photo of a large {}",
    "a photo of a nice {}",
    "a photo of a weird {}",
    "a cartoon of the {}",
    "art of a {}",
    "a sketch of the {}",
    "a pixelated photo of a {}",
    "itap of the {}",
    "a good photo of a {}",
    "a plushie {}",
    "a photo of a small {}",
    "a photo of the weird {}",
    "a black and white photo of a {}",
    "a dark photo of a {}",
    "itap of a {}",
    "graffiti of the {}",
    "a toy {}",
    "itap of my {}",
    "a photo of a cool {}",
    "a tattoo of the {}",
    "a centered satellite photo of {}",
    "a photo of a {}, a type of food",
    "a photo of a {}, a type of animal",
    "a line drawing of a {}",
    "a {} in a flat style",
    "an outline of a {}",
)


def in_template(text: str, rng: random.Random) -> str:
    """The text in a random template; the plain ones are drawn more often."""
    templates = TEMPLATES if rng.random() < 0.75 else RARE_TEMPLATES
    return rng.choice(templates).format(text)


def name_caption(emoji: Emoji, rng: random.Random) -> str:
    """The name, or now and then another name, in a random template."""
    name = emoji.name
    if emoji.other_names and rng.random() < 0.35:
        name = rng.choice(emoji.other_names)
    return in_template(name, rng)


def subcategory_caption(subcategory: str, rng: random.Random) -> str:
    """The subcategory's words in a random template."""
    return in_template(subcategory_text(subcategory), rng)


def every_text() -> list[str]:
    """All words that can occur in a caption, for the tokenizer."""
    texts = [*TEMPLATES, *RARE_TEMPLATES]
    for emoji in all_emoji():
        texts += [emoji.name, *emoji.other_names, subcategory_text(emoji.subcategory)]
        texts += [emoji.category]
    return texts

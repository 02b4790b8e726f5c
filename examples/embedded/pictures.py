"""Emoji as small labelled pictures: the same things, with names, in twelve drawing styles.

from embedded.pictures import load_style, SEEN, NEAR, FAR

style = load_style("openmoji")
style.images      # uint8 (N, 48, 48, 3), on white
style.names       # "grinning face", ...
style.groups      # equal for man, woman and person variants: never split a group
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parent / "pictures"

# The styles the embedded CLIP was pretrained on, and the two it has never seen.
SEEN = (
    "noto",
    "noto-v1",
    "fxemoji",
    "fluent-emoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
    "twemoji",
    "emojione",
    "emojione-monotone",
    "streamline-emojis",
)
NEAR = "emojione-v1"
FAR = "openmoji"

# Any style can also be had as a photographic negative, of which the pretraining saw nothing either.
NEGATIVE = "-negative"


@dataclass(frozen=True)
class Emoji:
    """One emoji: what it is called and where it belongs, whatever the style."""

    index: int
    id: str
    name: str
    other_names: tuple[str, ...]
    category: str
    subcategory: str
    group: str


@dataclass(frozen=True)
class Style:
    """All pictures of one style; row i of every field describes picture i."""

    style: str
    images: np.ndarray
    emoji: tuple[Emoji, ...]

    def __len__(self) -> int:
        return len(self.emoji)

    @property
    def ids(self) -> list[str]:
        """Code points in hexadecimal, joined by hyphens."""
        return [e.id for e in self.emoji]

    @property
    def names(self) -> list[str]:
        """The name of each picture."""
        return [e.name for e in self.emoji]

    @property
    def categories(self) -> list[str]:
        """One of nine broad categories for each picture."""
        return [e.category for e in self.emoji]

    @property
    def subcategories(self) -> list[str]:
        """One of the 95 fine categories for each picture."""
        return [e.subcategory for e in self.emoji]

    @property
    def groups(self) -> list[str]:
        """A key shared by the variants of one emoji, such as man, woman and person."""
        return [e.group for e in self.emoji]


@cache
def _index() -> dict[str, Any]:
    return json.loads((FOLDER / "index.json").read_text())


def styles() -> tuple[str, ...]:
    """The names of all styles."""
    return tuple(_index()["styles"])


def folder_of(style: str) -> Path:
    """The folder with a style's sheet and licence."""
    if style not in _index()["styles"]:
        raise ValueError(f"no style {style!r}; there are {', '.join(styles())}")
    return FOLDER / _index()["styles"][style]["folder"]


@cache
def all_emoji() -> tuple[Emoji, ...]:
    """Every emoji of the index, in Unicode's order; no style has to have all of them."""
    return tuple(
        Emoji(i, **{**entry, "other_names": tuple(entry["other_names"])})
        for i, entry in enumerate(_index()["emoji"])
    )


def load_style(style: str) -> Style:
    """Read one style's sheet; "openmoji-negative" is "openmoji" with light and dark exchanged."""
    if style.endswith(NEGATIVE):
        positive = load_style(style.removesuffix(NEGATIVE))
        return Style(style, 255 - positive.images, positive.emoji)
    folder = folder_of(style)
    rows_of = _index()["styles"][style]["emoji"]
    size, columns = _index()["size"], _index()["columns"]
    with Image.open(folder / "sheet.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    tiles = pixels.reshape(-1, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    emoji = all_emoji()
    return Style(style, tiles[: len(rows_of)].copy(), tuple(emoji[i] for i in rows_of))


def subcategory_text(subcategory: str) -> str:
    """A subcategory as words: "food-fruit" is "food fruit"."""
    return subcategory.replace("-", " ").replace("&", "and")

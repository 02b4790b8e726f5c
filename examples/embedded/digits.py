"""Handwritten digits, a few of each to train on; photographs, to see what a network still knows.

    from embedded.digits import digits_task, photograph_crops

    task = digits_task(seed=0, shots=8)
    task.train[0]                        # {"image": a PIL image, "label": 3}
    crops = photograph_crops(count=300)  # PIL images

The digits are scikit-learn's: 1,797 scans of what 13 people wrote, 8 × 8 grey pixels each, from the
UCI repository (CC-BY-4.0). The photographs are those that scikit-image and scikit-learn ship, whose
licences are beside them in those packages.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from graftune.integrations.extras import require

# Of scikit-image (NASA's, CC0 or public domain), without drawings, scans and microscopes.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
MORE_PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # of scikit-learn (CC-BY-2.0)
LEAST_SHARE = 0.1  # of a photograph's area, in a crop


@dataclass(frozen=True)
class DigitsTask:
    """Rows with an "image" and a "label", 0 to 9."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]


def digits_task(seed: int = 0, shots: int = 8) -> DigitsTask:
    """Draw a few digits of each kind to train on; two thirds of the others are the test.

    What is for training, validation and testing depends on the seed, of what is for training more
    with more shots.

    Raises:
        ValueError: `shots` is not between 1 and 50.
        ImportError: scikit-learn is not installed.
    """
    if not 1 <= shots <= 50:
        raise ValueError(f"shots has to be between 1 and 50, got {shots}")
    digits = require("sklearn.datasets", extra="examples").load_digits()
    rng = random.Random(seed)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for label in range(10):
        places = np.flatnonzero(digits.target == label).tolist()
        rng.shuffle(places)
        bounds = {"train": (0, shots), "validation": (50, 90), "test": (90, len(places))}
        for part, (first, end) in bounds.items():
            pictures = (_picture(digits.images[place]) for place in places[first:end])
            parts[part] += [{"image": picture, "label": label} for picture in pictures]
    return DigitsTask(**parts)


def _picture(values: np.ndarray) -> Image.Image:
    """A digit, 0 to 16, as a grey picture."""
    return Image.fromarray((values * (255 / 16)).round().astype(np.uint8))


def photographs() -> list[Image.Image]:
    """The photographs, in colour.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
    """
    first = Path(require("skimage", extra="examples").__file__).parent / "data"
    second = Path(require("sklearn", extra="examples").__file__).parent / "datasets" / "images"
    files = [first / name for name in PHOTOGRAPHS] + [second / name for name in MORE_PHOTOGRAPHS]
    return [Image.open(file).convert("RGB") for file in files]


def photograph_crops(count: int = 300, seed: int = 0) -> list[Image.Image]:
    """Draw square parts of the photographs, as many of each."""
    rng = random.Random(seed)
    whole = photographs()
    return [_crop(whole[place % len(whole)], rng) for place in range(count)]


def _crop(picture: Image.Image, rng: random.Random) -> Image.Image:
    longest = min(picture.size)
    side = round(longest * rng.uniform(LEAST_SHARE, 1) ** 0.5)
    left, top = (rng.randint(0, length - side) for length in picture.size)
    return picture.crop((left, top, left + side, top + side))

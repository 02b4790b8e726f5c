"""Stand-ins for the data sets that PEFT's tests load from the Hub."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

QUOTES = (
    "Still waters run deep.",
    "Well begun is half done.",
    "Many hands make light work.",
    "Actions speak louder than words.",
)


@lru_cache
def image() -> Any:
    """Return a picture of noise."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@lru_cache
def quotes() -> Any:
    """Return proverbs, with the columns of the data set that PEFT's tests train on."""
    from datasets import Dataset, DatasetDict

    rows = [{"quote": quote, "author": "", "tags": [""]} for quote in QUOTES * 8]
    return DatasetDict({"train": Dataset.from_list(rows)})

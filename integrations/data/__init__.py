"""Own data in one line: pictures and texts from files, the Hub or objects, and parts of them."""

from graftune.integrations.data.images import ImageCollator, load_images, pixels
from graftune.integrations.data.pictures import UnreadableImageError, open_image
from graftune.integrations.data.sampling import (
    Selection,
    few_shot,
    hold_out,
    select_classes,
    split_classes,
)
from graftune.integrations.data.text import load_texts, text_collator, tokenize_texts

__all__ = [
    "ImageCollator",
    "Selection",
    "UnreadableImageError",
    "few_shot",
    "hold_out",
    "load_images",
    "load_texts",
    "open_image",
    "pixels",
    "select_classes",
    "split_classes",
    "text_collator",
    "tokenize_texts",
]

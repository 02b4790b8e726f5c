"""The embedded CLIP: an ordinary `transformers.CLIPModel`, pretrained on the embedded pictures.

from embedded.model import CLIP

model = CLIPModel.from_pretrained(CLIP)
processor = CLIPProcessor.from_pretrained(CLIP)
"""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPModel, CLIPProcessor

CLIP = Path(__file__).resolve().parent / "clip"


def load_clip(folder: Path = CLIP) -> tuple[CLIPModel, CLIPProcessor]:
    """The pretrained model in float32, in evaluation mode, and its processor."""
    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)

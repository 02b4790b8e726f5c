"""What generated images are worth: their distance to real ones, and to their texts."""

from graftune.integrations.generation.clip_features import (
    ClipImageFeatures,
    clip_score,
    picture_agreement,
)
from graftune.integrations.generation.distances import image_distances
from graftune.integrations.generation.harmony import visual_linguistic_harmony

__all__ = [
    "ClipImageFeatures",
    "clip_score",
    "image_distances",
    "picture_agreement",
    "visual_linguistic_harmony",
]

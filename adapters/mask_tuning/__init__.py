"""Mask tuning: which pretrained weights to switch off (R-AMT, arXiv 2307.15049)."""

from ..registration import register
from .config import MaskTuningConfig
from .layer import MaskTuningLayer
from .model import MaskTuningModel
from .released import export_released, from_released, import_released, to_released
from .selection import importance, is_pending, most_important, select
from .stored import StoredMask, is_stored_mask, stored_masks

__all__ = [
    "MaskTuningConfig",
    "MaskTuningLayer",
    "MaskTuningModel",
    "StoredMask",
    "export_released",
    "from_released",
    "import_released",
    "importance",
    "is_pending",
    "is_stored_mask",
    "most_important",
    "select",
    "stored_masks",
    "to_released",
]

register("mask_tuning", MaskTuningConfig, MaskTuningModel)

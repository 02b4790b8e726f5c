"""Mask tuning: which pretrained weights to switch off (R-AMT, arXiv 2307.15049)."""

from graftune.adapters.base.registration import register
from graftune.adapters.mask_tuning.config import MaskTuningConfig
from graftune.adapters.mask_tuning.layer import MaskTuningLayer
from graftune.adapters.mask_tuning.model import MaskTuningModel
from graftune.adapters.mask_tuning.released import (
    export_released,
    from_released,
    import_released,
    to_released,
)
from graftune.adapters.mask_tuning.selection import importance, is_pending, most_important, select
from graftune.adapters.mask_tuning.stored import StoredMask, is_stored_mask, stored_masks

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

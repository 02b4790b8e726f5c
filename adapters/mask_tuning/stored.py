"""What a saved adapter's masks are, read off its file alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graftune.adapters.mask_tuning.coding import decode_mask, mask_shape
from graftune.adapters.mask_tuning.state import BITS


@dataclass(frozen=True)
class StoredMask:
    """A mask in a file.

    Args:
        shape: of the weight that it masks.
        masked: how many of its entries are zero.
    """

    shape: tuple[int, ...]
    masked: int

    @property
    def share(self) -> float:
        """Which share of the weight is masked."""
        return self.masked / max(1, self.size)

    @property
    def size(self) -> int:
        """How many entries the mask has."""
        return math.prod(self.shape)


def is_stored_mask(name: str) -> bool:
    """Say whether a tensor of an adapter's file is a mask, by its name."""
    return f".{BITS}." in name


def stored_masks(tensors: Mapping[str, Tensor]) -> dict[str, StoredMask]:
    """Return what the masks among a file's tensors are, by name.

    Raises:
        MaskFormatError: one is damaged or of a newer version.

    Example:
        >>> from safetensors.torch import load_file
        >>> stored_masks(load_file("adapter/adapter_model.safetensors"))
        {'base_model.model.fc.mask_tuning_bits.weight': StoredMask(shape=(8, 4), masked=3)}
    """
    return {
        name: StoredMask(mask_shape(data), int((~decode_mask(data)).sum()))
        for name, data in tensors.items()
        if is_stored_mask(name)
    }

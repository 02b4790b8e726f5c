"""Which errors have a cause that the user can do something about."""

from __future__ import annotations

import torch
from safetensors import SafetensorError


class UsageError(ValueError):
    """The command line or a YAML file says something that there is not."""


# What graftune's own checks raise, and what the world outside does: files, the Hub, packages that
# are missing, numbers that overflow, memory that is full. Others are bugs, and show where.
_EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    SafetensorError,
    torch.OutOfMemoryError,
)


def is_expected(error: Exception) -> bool:
    """Tell an error that one line explains from a bug."""
    if isinstance(error, _EXPECTED):
        return True
    # Only here: it brings all of transformers' trainer.
    from graftune.integrations.trainer import CheckpointError

    return isinstance(error, CheckpointError)

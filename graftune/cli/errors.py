"""Which errors have a cause that the user can do something about."""

from __future__ import annotations

import torch
from safetensors import SafetensorError

from graftune.integrations.sharing.fetch import one_line


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

# What the library's errors advise in Python, and how it is said on the command line.
_ADVICE = {
    "resume_from_checkpoint=True": "`resume: auto`",
    "ImageCollator(..., unreadable='skip')": "`unreadable: skip`",
    "load_images(..., image=...)": "`image_column`",
    "load_images(..., label=...)": "`label_column`",
    "load_texts(..., text=...)": "`text_column`",
}


def said(error: Exception) -> str:
    """Return an error's message in one line, with advice for the command line.

    Example:
        >>> said(ValueError("no column 'image'.\nName it: load_images(..., image=...)"))
        "no column 'image'. Name it: `image_column`"
    """
    message = one_line(error)
    for in_python, on_command_line in _ADVICE.items():
        message = message.replace(in_python, on_command_line)
    return message


def is_expected(error: Exception) -> bool:
    """Tell an error that one line explains from a bug."""
    if isinstance(error, _EXPECTED):
        return True
    # Only here: it brings all of transformers' trainer.
    from graftune.integrations.training import CheckpointError

    return isinstance(error, CheckpointError)

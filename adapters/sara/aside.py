"""Numbers that are not needed while a model runs, kept out of the memory it runs in."""

from __future__ import annotations

import os
import tempfile
import warnings

import torch
from torch import Tensor

SMALL = 2**16  # bytes that are not worth a file


def aside(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that lies on the CPU, or in a temporary file if it does already.

    The file has no name, is mapped into memory when it is read, and is gone with the tensor; the
    system may drop what it holds of it. Where files in use cannot be without a name (Windows), and
    for small tensors, the copy is in memory.

    Args:
        tensor: of any shape and dtype.

    Warns:
        RuntimeWarning: once, where the file cannot be written; the copy is in memory then.

    Example:
        >>> aside(torch.arange(3))
        tensor([0, 1, 2])
    """
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        return tensor.cpu()
    if tensor.nbytes < SMALL or os.name != "posix":
        return tensor.clone()
    content = tensor.contiguous().view(torch.uint8).numpy()
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content.data)  # through the map, a full disk would end the process
            file.flush()
            mapped = torch.from_file(file.name, size=content.size, dtype=torch.uint8)
    except OSError as error:
        warnings.warn(
            f"the base model's own values stay in memory: no temporary file could be written "
            f"({error}). Set TMPDIR to a folder with enough space",
            RuntimeWarning,
            stacklevel=2,
        )
        return tensor.clone()
    return mapped.view(tensor.dtype).reshape(tensor.shape)

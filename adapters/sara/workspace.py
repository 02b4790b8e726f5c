"""Memory for what a layer needs for a moment: the same again and again, in each thread.

On a CPU fresh memory costs as much as filling it: it comes from the system a page at a time, and
lies in no cache. Devices whose allocator keeps what was freed need none of this.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_of_thread = threading.local()


def workspace(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor that is valid until the thread's next call, as `torch.empty`.

    With gradients on, or where a graph is compiled, it is a tensor of its own.

    Args:
        shape: its shape.
        dtype: its dtype.
        device: where it shall be.

    Example:
        >>> workspace((2, 3), dtype=torch.float32, device=torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    # With gradients on, as in a backward pass that is differentiated itself, it would be kept.
    if device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    wanted = math.prod(shape) * dtype.itemsize
    memory: Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or memory.numel() < wanted:
        with torch.inference_mode(False):  # or it could not be written to outside of the mode
            memory = _of_thread.memory = torch.empty(wanted, dtype=torch.uint8)
    return memory[:wanted].view(dtype).view(shape)


def held() -> int:
    """Return how many bytes the thread keeps for its workspaces."""
    memory: Tensor | None = getattr(_of_thread, "memory", None)
    return 0 if memory is None else memory.numel()

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


def workspace(
    use: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return an uninitialised tensor, as `torch.empty`, to be done with before the next of its use.

    With gradients on, or where a graph is compiled, it is a tensor of its own.

    Args:
        use: what for. A thread's next call for the same use returns the same memory.
        shape: its shape.
        dtype: its dtype.
        device: where it shall be.

    Example:
        >>> workspace("example", (2, 3), dtype=torch.float32, device=torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    # With gradients on, as in a backward pass that is differentiated itself, it would be kept.
    if device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    wanted = math.prod(shape) * dtype.itemsize
    by_use = _by_use()
    if use not in by_use or by_use[use].numel() < wanted:
        with torch.inference_mode(False):  # or it could not be written to outside of the mode
            by_use[use] = torch.empty(wanted, dtype=torch.uint8)
    return by_use[use][:wanted].view(dtype).view(shape)


def held() -> int:
    """Return how many bytes the thread keeps for its workspaces."""
    return sum(memory.numel() for memory in _by_use().values())


def _by_use() -> dict[str, Tensor]:
    if not hasattr(_of_thread, "by_use"):
        _of_thread.by_use = {}
    return _of_thread.by_use

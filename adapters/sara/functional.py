"""Which weights SaRA trains: selection by magnitude, as pure functions of the weights.

SaRA trains the weights of smallest magnitude, |w| < t (High-efficient diffusion model fine-tuning
with progressive sparse low-rank adaptation, arXiv 2409.06633, section 4.1). A share or a number of
weights comes down to a magnitude as well: the cutoff at which so many weights lie below it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

Select = Literal["smallest", "largest", "random"]

CHUNK = 2**20  # weights looked at in one go: what is computed of them stays in a few MiB
_BITS = 16  # of a magnitude's bit pattern that one pass sorts by


def selected(weight: Tensor, cutoff: float, select: Select = "smallest", seed: int = 0) -> Tensor:
    """Return the booleans that say which entries of a tensor are trained.

    Args:
        weight: of any shape, floating point. Half precision is compared as float32.
        cutoff: t > 0 for "smallest", |w| < t, and for "largest", |w| > t; both strict. For "random"
            the probability, in (0, 1), of an entry being chosen.
        select: the rule.
        seed: of "random"; see `tensor_seed`.

    Returns:
        Booleans of the weight's shape, on its device.

    Example:
        >>> selected(torch.tensor([0.001, -0.002, 0.003]), 0.002)
        tensor([ True, False, False])
    """
    flat = weight.detach().reshape(-1)
    chosen = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, flat.numel(), CHUNK):
        part = _magnitude(flat[start : start + CHUNK])
        if select == "smallest":
            mask = part < cutoff
        elif select == "largest":
            mask = part > cutoff
        else:
            mask = torch.rand(part.shape, generator=generator) < cutoff
        chosen[start : start + CHUNK] = mask
    return chosen.reshape(weight.shape)


def outside(values: Tensor, cutoff: float, select: str) -> Tensor:
    """Return the booleans that say which trained values `selected` would not take any more.

    That is |v| ≥ t for "smallest", |v| ≤ t for "largest", and none for "random".
    """
    if select == "random":
        return torch.zeros_like(values, dtype=torch.bool)
    magnitudes = _magnitude(values.detach())
    return magnitudes >= cutoff if select == "smallest" else magnitudes <= cutoff


def tensor_seed(seed: int, name: str) -> int:
    """Return a seed for one tensor's random selection: of the adapter's seed and its name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def count_below(weights: Mapping[str, Tensor], threshold: float) -> int:
    """Return how many weights have |w| < t, over all tensors.

    Example:
        >>> count_below({"a": torch.tensor([0.1, 0.3]), "b": torch.tensor([-0.2])}, 0.25)
        2
    """
    parts = (part for tensor in weights.values() for part in _magnitudes(tensor))
    return sum(int((part < threshold).sum()) for part in parts)


def magnitude_of_rank(weights: Mapping[str, Tensor], rank: int) -> float:
    """Return the magnitude that exactly `rank` weights would precede, sorted over all tensors.

    Found digit by digit in the bit patterns of the magnitudes, which sort as they do: exact, and in
    memory that does not grow with the model.

    Args:
        weights: at least `rank + 1` entries in all; compared as float32, or as float64 where one of
            them is.
        rank: counted from 0.

    Example:
        >>> magnitude_of_rank({"w": torch.tensor([0.5, -0.25, 1.0])}, 1)
        0.5
    """
    is_double = any(tensor.dtype == torch.float64 for tensor in weights.values())
    dtype, bits = (torch.float64, torch.int64) if is_double else (torch.float32, torch.int32)
    prefix = 0
    for shift in range(bits.itemsize * 8 - _BITS, -1, -_BITS):
        counts = torch.zeros(2**_BITS, dtype=torch.int64)
        for tensor in weights.values():
            for part in _magnitudes(tensor):
                pattern = part.to(dtype).view(bits).long()
                digits = pattern >> shift
                same = digits[digits >> _BITS == prefix] & (2**_BITS - 1)
                counts += torch.bincount(same, minlength=2**_BITS).cpu()
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, rank, right=True))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = prefix << _BITS | digit
    return float(torch.tensor([prefix], dtype=bits).view(dtype))


def cutoff_for(weights: Mapping[str, Tensor], count: int, select: Select) -> float:
    """Return the cutoff at which `selected` takes `count` of all weights, or up to ties fewer.

    Args:
        weights: by name.
        count: in [1, number of weights).
        select: the rule; for "random" the cutoff is the share count / number of weights.

    Example:
        >>> cutoff_for({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, 1, "largest")
        3.0
    """
    total = sum(tensor.numel() for tensor in weights.values())
    if select == "random":
        return count / total
    return magnitude_of_rank(weights, count if select == "smallest" else total - count - 1)


def _magnitudes(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        yield _magnitude(flat[start : start + CHUNK])


def _magnitude(part: Tensor) -> Tensor:
    return part.to(torch.promote_types(part.dtype, torch.float32)).abs()

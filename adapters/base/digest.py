"""A digest of a base model: proof that an adapter is loaded onto the weights it was trained on.

The digest must be cheap (a 1 B model in well under a second) and must agree for float32, float16
and bfloat16 copies of one checkpoint. No hash of values can do the latter: two neighbouring
bfloat16 numbers are joined by a float16 number that rounds to either, so a function that agrees
across the copies of *every* checkpoint is constant. The digest is therefore a hash of names and
shapes plus a sketch of sampled values, compared within the rounding of the coarsest type.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping

import torch

VERSION = "1"
MAX_SAMPLES = 256  # values in all; 2 bytes each
MAX_SAMPLES_PER_TENSOR = 8
# Rounding to bfloat16 moves a number by at most 2^-9 of itself. Two roundings on either side, and
# a factor of two for safety.
RELATIVE_TOLERANCE = 2.0**-7
# float16 has no numbers finer than 2^-24 apart.
ABSOLUTE_TOLERANCE = 2.0**-24
# Fractional part of the golden ratio: multiples of it spread evenly over a tensor.
_GOLDEN = 0.6180339887498949


def base_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of named base tensors: `version:structure:values`.

    Args:
        tensors: the tensors that an adapter is attached to, by their names in the base model;
            floating point, on any device, of any dtype.

    Returns:
        `structure` is a hash of names and shapes; `values` holds up to 256 sampled values as
        bfloat16, base64-encoded. A model of any size costs one small gather a tensor.

    Example:
        >>> weight = torch.linspace(-1, 1, 64).reshape(8, 8)
        >>> full, half = base_digest({"w": weight}), base_digest({"w": weight.half()})
        >>> difference(full, half) is None
        True
    """
    names = sorted(tensors)
    structure = hashlib.sha256()
    for name in names:
        structure.update(f"{name}{tuple(tensors[name].shape)};".encode())
    values = _sample([tensors[name] for name in names])
    bits = values.view(torch.int16).tolist()
    encoded = base64.b64encode(struct.pack(f"<{len(bits)}h", *bits)).decode()
    return f"{VERSION}:{structure.hexdigest()[:16]}:{encoded}"


def difference(recorded: str, found: str) -> str | None:
    """Say how two digests differ, or return None when they are of the same base model.

    Args:
        recorded: the digest saved with an adapter.
        found: the digest of the model at hand.
    """
    recorded_version, recorded_structure, recorded_values = recorded.split(":")
    found_version, found_structure, found_values = found.split(":")
    if recorded_version != found_version:
        return (
            f"the digest has version {recorded_version}, this graftune reads version "
            f"{found_version}: update graftune"
        )
    if recorded_structure != found_structure:
        return "the adapted tensors have other names or shapes"
    theirs, ours = _decode(recorded_values), _decode(found_values)
    largest = torch.maximum(theirs.abs(), ours.abs())
    off = ~((theirs - ours).abs() <= RELATIVE_TOLERANCE * largest + ABSOLUTE_TOLERANCE)
    if off.any():
        return f"{int(off.sum())} of {off.numel()} sampled weights have other values"
    return None


def _sample(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return sampled values of `tensors` as one bfloat16 vector on the CPU."""
    if not tensors:
        return torch.empty(0, dtype=torch.bfloat16)
    each = max(1, min(MAX_SAMPLES_PER_TENSOR, MAX_SAMPLES // len(tensors)))
    # More tensors than samples: an even selection of them.
    stride = -(-len(tensors) // MAX_SAMPLES)
    samples = []
    for tensor in tensors[::stride]:
        offsets = [int((i + 1) * _GOLDEN % 1 * tensor.numel()) for i in range(each)]
        given = tensor.detach() if tensor.dim() else tensor.detach().reshape(1)
        index = torch.unravel_index(torch.tensor(offsets, device=given.device), given.shape)
        samples.append(given[index].to(torch.bfloat16))
    return torch.cat([sample.cpu() for sample in samples])


def _decode(values: str) -> torch.Tensor:
    count = len(decoded := base64.b64decode(values)) // 2
    bits = struct.unpack(f"<{count}h", decoded)
    return torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).double()

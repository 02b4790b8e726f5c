"""Masks as bytes: exact, near their entropy, never more than a bit a weight."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftune.adapters.mask_tuning import from_released, to_released
from graftune.adapters.mask_tuning.coding import (
    MaskFormatError,
    decode_mask,
    encode_mask,
    mask_shape,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "ramt_mask_encoding.npz"


def drawn(size: int, zeros: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) >= zeros


def entropy_bytes(mask: torch.Tensor) -> float:
    share = 1 - float(mask.double().mean())
    return mask.numel() * sum(-p * math.log2(p) for p in (share, 1 - share) if p > 0) / 8


@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=2).map(tuple),
    zeros=st.sampled_from([0.0, 1e-4, 0.003, 0.0256, 0.3, 0.5, 0.7, 0.99, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_decoded_is_what_was_encoded(shape: tuple[int, ...], zeros: float, seed: int) -> None:
    mask = drawn(math.prod(shape), zeros, seed).view(shape)
    data = encode_mask(mask)
    assert data.dtype == torch.uint8
    assert mask_shape(data) == shape
    assert torch.equal(decode_mask(data), mask)
    assert torch.equal(encode_mask(decode_mask(data)), data)
    assert data.numel() <= math.ceil(mask.numel() / 8) + 16


@pytest.mark.parametrize("mask", [torch.tensor(True), torch.ones(0, dtype=torch.bool)])
def test_the_smallest_masks(mask: torch.Tensor) -> None:
    assert torch.equal(decode_mask(encode_mask(mask)), mask)


@pytest.mark.parametrize("zeros", [0.001, 0.01, 0.0256, 0.05, 0.1, 0.2, 0.8, 0.99])
def test_size_is_near_the_entropy(zeros: float) -> None:
    mask = drawn(600_000, zeros)
    assert encode_mask(mask).numel() <= 1.1 * entropy_bytes(mask)


def test_damaged_bytes_are_refused() -> None:
    data = encode_mask(drawn(1000, 0.1))
    for damaged in (data[:0], data[:4], data[:-1], data.flip(0), torch.zeros(9, dtype=torch.uint8)):
        with pytest.raises(MaskFormatError):
            decode_mask(damaged)
    changed = data.clone()
    changed[-1] ^= 1
    with pytest.raises(MaskFormatError, match="checksum"):
        decode_mask(changed)
    newer = data.clone()
    newer[0] += 16
    with pytest.raises(MaskFormatError, match="update graftune"):
        decode_mask(newer)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_the_released_bytes_are_the_reference(case: str) -> None:
    with np.load(GOLDEN) as file:
        scores = torch.as_tensor(file[f"mask_real_{case}"])
        expected = file[f"bytes_{case}"].tobytes()
        decoded = torch.as_tensor(file[f"decoded_{case}"])
        threshold = float(file["threshold"])
    assert to_released(scores > threshold) == expected
    assert torch.equal(from_released(expected, tuple(scores.shape)).double(), decoded)


def test_released_bytes_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="has 2 bytes, got 1"):
        from_released(b"\x00", (3, 3))

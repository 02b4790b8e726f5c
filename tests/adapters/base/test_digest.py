"""The digest of a base model: equal for copies of one checkpoint, different for another."""

from __future__ import annotations

import pytest
import torch

from graftune.adapters.base.digest import MAX_SAMPLES, base_digest, difference


def tensors(seed: int = 0, count: int = 3, std: float = 0.02) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(40, 30, generator=generator) * std for i in range(count)}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("std", [1e-6, 0.02, 3.0])
def test_copies_in_other_dtypes_agree(seed: int, std: float) -> None:
    digests = [
        base_digest({name: tensor.to(dtype) for name, tensor in tensors(seed, std=std).items()})
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    ]
    for a in digests:
        for b in digests:
            assert difference(a, b) is None


def test_other_values_names_and_shapes_differ() -> None:
    digest = base_digest(tensors())
    assert "other values" in (difference(digest, base_digest(tensors(seed=1))) or "")
    renamed = {f"x.{name}": tensor for name, tensor in tensors().items()}
    assert "names or shapes" in (difference(digest, base_digest(renamed)) or "")
    reshaped = {name: tensor.T.contiguous() for name, tensor in tensors().items()}
    assert "names or shapes" in (difference(digest, base_digest(reshaped)) or "")


def test_a_fine_tuned_sibling_differs() -> None:
    base = tensors()
    tuned = {name: t + 0.05 * t.std() * torch.randn_like(t) for name, t in base.items()}
    assert difference(base_digest(base), base_digest(tuned)) is not None


def test_order_and_layout_do_not_matter() -> None:
    base = tensors()
    strided = {name: base[name].T.contiguous().T for name in reversed(base)}
    assert base_digest(base) == base_digest(strided)


@pytest.mark.parametrize("count", [0, 1, 300, 1000])
def test_it_is_small_whatever_the_model(count: int) -> None:
    digest = base_digest({f"w{i}": torch.zeros(2, 2) for i in range(count)})
    assert len(digest) < 4 * MAX_SAMPLES
    assert difference(digest, digest) is None

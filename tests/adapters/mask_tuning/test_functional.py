"""The mathematics of mask tuning against the reference implementation's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from graftune.adapters.mask_tuning.functional import (
    binarize,
    mask_of,
    masked_weight,
    scores_of,
)

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(case: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {name: torch.as_tensor(file[name]) for name in file.files}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_binarizer_is_the_reference() -> None:
    case = golden("ramt_binarizer")
    scores = case["input"].requires_grad_()
    mask = binarize(scores, float(case["threshold"]))
    assert_close(mask.detach(), case["output"])
    mask.backward(case["grad_output"])
    assert scores.grad is not None
    assert_close(scores.grad, case["grad_input"])


def test_linear_is_the_reference() -> None:
    case = golden("ramt_linear")
    scores = case["mask_real"].requires_grad_()
    weight = masked_weight(case["weight"], scores, float(case["threshold"]))
    output = F.linear(case["input"], weight, case["bias"])
    assert_close(output.detach(), case["output"])
    output.square().sum().backward()
    assert scores.grad is not None
    assert_close(scores.grad, case["grad_mask_real"])


def test_a_score_on_the_threshold_is_masked() -> None:
    assert binarize(torch.tensor([0.005, 0.0051]), 0.005).tolist() == [0, 1]
    assert masked_weight(torch.ones(2), torch.tensor([0.005, 0.0051]), 0.005).tolist() == [0, 1]


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple),
    seed=st.integers(0, 2**16),
)
def test_masked_weight_is_the_product_and_so_is_its_gradient(
    shape: tuple[int, ...], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw, dtype=torch.float64)
    first, second = (torch.randn(shape, generator=draw).double() for _ in range(2))
    gradients = []
    for chained in (True, False):
        scores = [t.clone().requires_grad_() for t in (first, second)]
        if chained:
            result = masked_weight(masked_weight(weight, scores[0], 0.1), scores[1], 0.1)
        else:
            result = weight * binarize(scores[0], 0.1) * binarize(scores[1], 0.1)
        result.sin().sum().backward()
        gradients.append([result.detach(), *(s.grad for s in scores)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@given(size=st.integers(1, 40), share=st.floats(0.01, 1.0), seed=st.integers(0, 2**16))
def test_scores_of_some_entries_are_those_of_all(size: int, share: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, 2, generator=draw)
    count = max(1, round(share * weight.numel()))
    index = torch.randperm(weight.numel(), generator=draw)[:count].sort().values.int()
    some = torch.randn(count, generator=draw).requires_grad_()
    dense = torch.ones(weight.numel())
    dense[index.long()] = some.detach()
    dense = dense.view(weight.shape).requires_grad_()
    results = masked_weight(weight, some, 0.0, index), masked_weight(weight, dense, 0.0)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    for result in results:
        result.square().sum().backward()
    assert some.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(some.grad, dense.grad.flatten()[index.long()])
    mask = mask_of(some, 0.0, weight.shape, index)
    torch.testing.assert_close(mask, dense.detach() > 0)


def test_gradients_of_the_weight_pass_where_it_is_kept() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    masked_weight(weight, torch.tensor([0.01, 0.0]), 0.005).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_a_mask_give_it_back(dtype: torch.dtype) -> None:
    mask = torch.tensor([True, False, True])
    scores = scores_of(mask, init=0.01, threshold=0.005, dtype=dtype)
    assert scores.dtype == dtype
    assert torch.equal(mask_of(scores, 0.005, mask.shape, None), mask)
    assert scores.tolist()[1] == 0

"""Folding Tucker forms into matrices is exact; what is cut is the best, with its error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftune.adapters.flora.functional import tucker_weight
from graftune.integrations.sharing.export.low_rank import LowRank, best, fold, fold_stack, reduced

SIZES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=2, max_size=5)


def tucker(sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    core = torch.randn([rank for _, rank in sizes], dtype=torch.float64)
    return core, [torch.randn(size, dtype=torch.float64) for size in sizes]


@given(SIZES)
@settings(deadline=None, max_examples=50)
def test_folding_is_exact_and_takes_the_smaller_rank(sizes: list[tuple[int, int]]) -> None:
    core, factors = tucker(sizes)
    form = fold(core, factors)
    torch.testing.assert_close(form.dense(), tucker_weight(core, factors).flatten(1))
    ranks = [rank for _, rank in sizes]
    assert form.rank == min(ranks[0], torch.Size(ranks[1:]).numel())
    torch.testing.assert_close(form.squared_norm(), float(form.dense().square().sum()))
    torch.testing.assert_close(form.mT.dense(), form.dense().mT)
    torch.testing.assert_close(form.padded(form.rank + 2).dense(), form.dense())


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=3, max_size=3))
@settings(deadline=None, max_examples=30)
def test_a_stack_is_folded_matrix_by_matrix(sizes: list[tuple[int, int]]) -> None:
    core, factors = tucker(sizes)
    form = fold_stack(core, factors)
    torch.testing.assert_close(form.dense(), tucker_weight(core, factors))
    assert form.rank == min(core.shape[1:])


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 6, 4)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_best_of_a_rank_has_the_error_it_says(shape: tuple[int, ...], rank: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    form, squared_error = best(matrix, rank)
    assert form.rank == min(rank, *shape[-2:])
    error = float((form.dense() - matrix).square().sum())
    assert squared_error == pytest.approx(error, abs=1e-12)
    # No other matrix of that rank is nearer: the error is that of the values left out.
    values = torch.linalg.svdvals(matrix)
    assert error == pytest.approx(float(values[..., rank:].square().sum()), abs=1e-12)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_reducing_a_product_equals_reducing_the_matrix(stack: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    form = LowRank(
        torch.randn(*stack, 9, 6, dtype=torch.float64),
        torch.randn(*stack, 6, 5, dtype=torch.float64),
    )
    less, squared_error = reduced(form, 2)
    expected, expected_error = best(form.dense(), 2)
    torch.testing.assert_close(less.dense(), expected.dense())
    assert squared_error == pytest.approx(expected_error)
    assert reduced(form, 6) == (form, 0.0)

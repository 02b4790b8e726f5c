"""The mathematics: Tucker forms, ranks and the count of operations."""

from __future__ import annotations

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.tucker_tensor import tucker_to_tensor

from graftune.adapters.flora import functional as flora

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def form(shape: list[int], ranks: list[int], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(*ranks, generator=generator, dtype=torch.float64)
    factors = [
        torch.randn(d, r, generator=generator, dtype=torch.float64)
        for d, r in zip(shape, ranks, strict=True)
    ]
    return core, factors


@given(st.data())
def test_tucker_weight_is_tensorly_s(data) -> None:
    shape = data.draw(SHAPES)
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=len(shape), max_size=len(shape)))
    core, factors = form(shape, ranks)
    with tensorly.backend_context("pytorch"):
        expected = 0.7 * tucker_to_tensor((core, factors))
    torch.testing.assert_close(flora.tucker_weight(core, factors, 0.7), expected)


@given(st.data())
def test_concatenate_is_the_sum(data) -> None:
    shape = data.draw(SHAPES)
    several = st.lists(st.integers(1, 4), min_size=len(shape), max_size=len(shape))
    parts = [form(shape, data.draw(several), seed) for seed in range(3)]
    core, factors = flora.concatenate(parts, [0.5, -2.0, 1.0])
    expected = sum(
        flora.tucker_weight(*part, weight)
        for part, weight in zip(parts, [0.5, -2.0, 1.0], strict=True)
    )
    torch.testing.assert_close(flora.tucker_weight(core, factors), expected)
    sums = [sum(part[0].shape[axis] for part in parts) for axis in range(len(shape))]
    assert list(core.shape) == [min(s, d) for s, d in zip(sums, shape, strict=True)]


def test_one_rank_stands_for_every_axis_and_is_cut() -> None:
    assert flora.resolve_ranks(8, (64, 32, 3, 5)) == (8, 8, 3, 5)
    assert flora.resolve_ranks([100, 2], (64, 32)) == (64, 2)


@pytest.mark.parametrize("r", [0, -1, [4, 0], [4], [4, 4, 4]])
def test_bad_ranks_are_refused(r) -> None:
    with pytest.raises(ValueError, match="rank"):
        flora.resolve_ranks(r, (8, 8))


def test_the_start_is_the_identity_with_the_authors_spread() -> None:
    core, factors = flora.init_tucker((4000, 3), (8, 2))
    assert not core.any()
    assert factors[0].std().item() == pytest.approx(1 / 16**0.5, rel=0.02)
    assert flora.init_tucker((4, 3), (2, 2), identity=False)[0].any()


def test_the_chain_is_chosen_where_it_saves_operations() -> None:
    assert flora.chain_is_cheaper((320, 320, 3, 3), (16, 16, 3, 3))
    assert flora.chain_is_cheaper((768, 768), (8, 8))
    # depthwise: the layer itself is as cheap as it gets
    assert not flora.chain_is_cheaper((64, 1, 7, 7), (16, 1, 2, 2), groups=64)
    assert not flora.chain_is_cheaper((32, 32), (32, 32))
    # c = 1088, d = 2048: saves as two operations, not against one with W + ΔW
    assert flora.chain_is_cheaper((64, 32), (8, 8), one_op=False)
    assert not flora.chain_is_cheaper((64, 32), (8, 8), one_op=True)

"""Places of entries: packed and unpacked, in blocks and as a whole, stored in two forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftune.adapters.sara import places as places_module
from graftune.adapters.sara.functional import (
    count_below,
    cutoff_for,
    magnitude_of_rank,
    selected,
    tensor_seed,
)
from graftune.adapters.sara.places import Places, mask_of_bits, mask_of_indices
from graftune.adapters.sara.stored import as_stored

SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    SHAPES, st.floats(0, 1), st.integers(0, 2**31), st.sampled_from([1, 8, 2**20]), st.booleans()
)
def test_places_are_those_of_the_mask(
    shape: tuple[int, ...], share: float, seed: int, block: int, flipped: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < share
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if flipped:  # as channels_last tensors are: not contiguous
        mask, weight = mask.transpose(0, -1) if shape else mask, weight
        weight = weight.transpose(0, -1) if shape else weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places_module, "BLOCK", block)
        places = Places.of(mask)
    assert places.count == int(mask.sum())
    assert torch.equal(places.indices(), mask.reshape(-1).nonzero().squeeze(1))
    assert torch.equal(places.take(weight), weight[mask])
    values = torch.arange(places.count, dtype=torch.float32)
    expected = weight.clone()
    expected[mask] = values.double()
    assert torch.equal(places.put(weight, values, torch.float64), expected)
    for part in places.blocks:
        rows = weight if not shape else weight[part.rows]
        assert torch.equal(places.take(rows, part), weight[mask][part.entries])
    assert torch.equal(mask_of_bits(places.bits(), tuple(mask.shape)), mask)
    assert torch.equal(mask_of_indices(places.indices(), tuple(mask.shape)), mask)


@pytest.mark.parametrize(("share", "most"), [(0.2, 1.01), (0.05, 1.01), (0.01, 4.0), (1e-4, 4.01)])
def test_about_a_byte_an_entry_in_memory(share: float, most: float) -> None:
    mask = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)) < share
    places = Places.of(mask)
    assert places.nbytes <= most * places.count
    assert torch.equal(places.indices(), mask.reshape(-1).nonzero().squeeze(1))


@pytest.mark.parametrize(
    ("share", "dtype"), [(0.1, torch.uint8), (0.04, torch.uint8), (0.02, torch.int32)]
)
def test_the_smaller_form_is_stored(share: float, dtype: torch.dtype) -> None:
    mask = torch.rand(300, 301, generator=torch.Generator().manual_seed(0)) < share
    stored = as_stored(Places.of(mask))
    assert stored.dtype == dtype
    sizes = {torch.uint8: -(-mask.numel() // 8), torch.int32: 4 * int(mask.sum())}
    assert stored.numel() * stored.element_size() == min(sizes.values())


def test_a_digest_tells_places_apart() -> None:
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.2
    other = mask.clone()
    other[3, 5] ^= True
    digests = {Places.of(m).digest() for m in (mask, other, mask.T, mask.reshape(32, 128))}
    assert len(digests) == 4
    assert Places.of(mask.clone()).digest() in digests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places_module, "BLOCK", 100)
        assert Places.of(mask).digest() in digests


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.floats(0, 0.999),
)
def test_a_magnitude_of_rank_is_that_of_sorting(
    sizes: list[int], seed: int, dtype: torch.dtype, at: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        str(i): torch.randn(size, generator=generator).to(dtype) for i, size in enumerate(sizes)
    }
    everything = torch.cat([t.double() for t in tensors.values()]).abs().sort().values
    rank = int(at * everything.numel())
    magnitude = magnitude_of_rank(tensors, rank)
    assert magnitude == everything[rank]
    assert count_below(tensors, magnitude) == int((everything < magnitude).sum())


def test_selections_take_as_many_as_they_are_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(100, 50, generator=generator) for n in "ab"}
    magnitudes = torch.stack(list(tensors.values())).abs()
    for select in ("smallest", "largest"):
        cutoff = cutoff_for(tensors, 700, select)
        masks = torch.stack([selected(tensor, cutoff, select) for tensor in tensors.values()])
        assert int(masks.sum()) == 700
        inside, outside = magnitudes[masks], magnitudes[~masks]
        if select == "smallest":
            assert inside.max() < outside.min()
        else:
            assert inside.min() > outside.max()
    share = cutoff_for(tensors, 1000, "random")
    a, b = (selected(t, share, "random", tensor_seed(0, name)) for name, t in tensors.items())
    assert 400 < int(a.sum()) < 600
    assert not torch.equal(a, b)
    again = selected(tensors["a"], share, "random", tensor_seed(0, "a"))
    assert torch.equal(a, again)
    assert not torch.equal(a, selected(tensors["a"], share, "random", tensor_seed(1, "a")))


def test_the_threshold_is_strict() -> None:
    weight = torch.tensor([0.5, -0.5, 0.25, -0.75])
    assert selected(weight, 0.5).tolist() == [False, False, True, False]
    assert selected(weight, 0.5, "largest").tolist() == [False, False, False, True]
    # Half precision is not rounded to: 2e-3 has a bfloat16 neighbour just below.
    half = torch.tensor([2e-3], dtype=torch.bfloat16)
    assert selected(half, 2e-3).item() == (float(half) < 2e-3)


def test_large_tensors_are_cut_where_products_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "BLOCK", 120)
    mask = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) < 0.2
    starts = [block.rows.start for block in Places.of(mask).blocks]
    assert starts == [0, 32, 64, 96, 128, 160, 192]  # 40 rows fit, 32 are taken
    assert len(Places.of(mask[:80]).blocks) == 1  # as large as two blocks

"""The benchmark of SaRA's claims judges rows as it says, and zeroes the weights that it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import claims_sara as benchmark


def row(variant: str, split: str, seed: int, **values: float) -> dict[str, Any]:
    """A row of results, as good as the base model's unless values say otherwise."""
    scores = dict.fromkeys(benchmark.MEASURES, 50.0)
    named = {name.replace("_", " "): value for name, value in values.items()}
    return {"variant": variant, "split": split, "seed": seed, "rate": 0.0, **scores, **named}


def rows_of_tests(kept: dict[str, float], fid: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of the test split, which differ by variant."""
    variants = [variant.name for variant in benchmark.VARIANTS]
    zeros = [
        benchmark.zeroed(share, which)
        for share in benchmark.SHARES
        for which in ("smallest", "random", "largest")
    ]
    return [
        row(name, "test", seed, old_kept=kept.get(name, 50.0), FID=fid.get(name, 50.0 + seed))
        for name in [*variants, *zeros]
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("which", ["smallest", "largest", "random"])
def test_a_share_of_the_weights_is_zeroed(which: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    benchmark.zero(net, 0.1, which, seed=3)
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    gone = after == 0
    assert gone.sum() == round(0.1 * len(before))
    assert torch.equal(after[~gone], before[~gone])
    if which == "smallest":
        assert before[gone].abs().max() < before[~gone].abs().min()
    if which == "largest":
        assert before[gone].abs().min() > before[~gone].abs().max()


def test_the_rate_is_the_one_that_keeps_most_at_the_fit_that_all_reach() -> None:
    rows = [
        {**row("SaRA", "validation", 9, FID=60.0, old_kept=80.0), "rate": 1.0},
        {**row("SaRA", "validation", 9, FID=40.0, old_kept=70.0), "rate": 2.0},
        {**row("SaRA", "validation", 9, FID=30.0, old_kept=60.0), "rate": 3.0},
        {**row("LoRA", "validation", 9, FID=37.0, old_kept=65.0), "rate": 4.0},
    ]
    assert benchmark.chosen_rates(rows) == {"SaRA": 2.0, "LoRA": 4.0}


def test_what_is_kept_is_compared_where_both_fit() -> None:
    points = {"a": [(10, 40), (20, 60), (50, 90)], "b": [(20, 50), (40, 70)]}
    rows = [
        row(name, split, 0, FID=fid, old_kept=kept)
        for name, some in points.items()
        for split, (fid, kept) in zip(
            ("test", benchmark.CURVE, benchmark.CURVE), some, strict=False
        )
    ]
    # a is 60 to 80 there, b 50 to 70: ten more all along.
    assert benchmark.more_at_the_same_fit(rows, "a", "b") == pytest.approx([10.0])


def test_claims_hold_or_not() -> None:
    smallest = {benchmark.zeroed(share, "smallest"): 97.0 for share in benchmark.SHARES}
    rows = rows_of_tests(
        {**smallest, "SaRA": 60.0}, {benchmark.LARGEST: 80.0, benchmark.RELEASE: 70.0}
    )
    held = [claim.holds for claim in benchmark.claims(rows)]
    assert held == [True, True, True, False, False, True, True, False]
    rows = rows_of_tests({benchmark.zeroed(0.1, "smallest"): 97.0, "LoRA": 60.0}, {})
    held = [claim.holds for claim in benchmark.claims(rows)]
    assert held[:3] == [True, False, False]

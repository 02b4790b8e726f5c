"""A claim holds by more than noise, or it does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import claims


@pytest.mark.parametrize(
    ("differences", "holds", "told"),
    [
        ([3.0, 4.0, 5.0], True, "x +4.0 ± 0.6, up in 3 of 3 seeds"),
        ([-1.0, 4.0, 1.0], False, "x +1.3 ± 1.5, up in 2 of 3 seeds (no more than noise)"),
        ([-3.0, -4.0, -5.0], False, "x -4.0 ± 0.6, up in 0 of 3 seeds"),
        ([0.0, 0.0, 0.0], False, "x +0.0 ± 0.0, up in 0 of 3 seeds"),
    ],
)
def test_better_by_more_than_noise(differences: list[float], holds: bool, told: str) -> None:
    claim = claims.superior("a is better", ("x", differences))
    assert (claim.text, claim.holds, claim.numbers) == ("a is better", holds, told)


def test_better_than_each() -> None:
    claim = claims.superior("a", ("over b:", [1.0, 1.0]), ("over c:", [-1.0, -1.0]))
    assert not claim.holds
    assert claim.numbers.startswith("over b: +1.0 ± 0.0")

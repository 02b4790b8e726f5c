"""Two processes train as one at the same global batch, whatever they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.processes import succeed
from support.training import CASES, split_runs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process found, and what each of two did."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    split_runs(one)
    succeed(split_runs, two, processes=2)
    return [torch.load(path) for path in (one / "found-0.pt", *sorted(two.glob("found-*.pt")))]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_and_terms_are_the_same(name: str, found: list[dict[str, Any]]) -> None:
    one, two, _ = (each[name] for each in found)
    assert two["logged"] == one["logged"]
    assert {"loss", "grad_norm"} <= set(one["logged"])
    assert len(one["rows"]) == 4
    # Logs are rounded to six digits after the point.
    torch.testing.assert_close(
        torch.tensor(two["rows"]), torch.tensor(one["rows"]), rtol=1e-4, atol=2e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_adapters_are_the_same(name: str, found: list[dict[str, Any]]) -> None:
    one, first, second = (each[name]["weights"] for each in found)
    for key, weight in one.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], weight, rtol=1e-4, atol=1e-6)

"""Epoch schedules: the numbers of the authors' released code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from graftune.integrations.schedules import cosine_rates, epoch_schedule, quarter_cosine_rates

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "schedules.npz")


@pytest.mark.parametrize(
    ("case", "epochs", "rate", "warmup"),
    [
        ("promptsrc_E20", 20, 0.0025, 1e-5),
        ("promptsrc_E50", 50, 0.0025, 1e-5),
        ("ramt_E30", 30, None, None),
        ("ramt_E10", 10, None, None),
    ],
)
def test_golden(case: str, epochs: int, rate: float | None, warmup: float | None) -> None:
    expected = GOLDEN[case]
    rates = cosine_rates(epochs, rate or float(expected[0]), warmup)
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


@pytest.mark.parametrize("epochs", [20, 50])
def test_golden_quarter_cosine(epochs: int) -> None:
    expected = GOLDEN[f"ovor_K{epochs}"]
    rates = quarter_cosine_rates(epochs, float(expected[0]))
    np.testing.assert_allclose([rates[0], *rates[:-1]], expected, rtol=1e-9)
    assert quarter_cosine_rates(1, 0.5) == [0.5]


def test_every_step_of_an_epoch_has_its_rate() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = epoch_schedule(optimizer, [0.1, 0.5, 0.2], steps_per_epoch=2)
    seen = []
    for _ in range(7):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.2, 0.2, 0.2])


def test_no_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        cosine_rates(0, 0.1)

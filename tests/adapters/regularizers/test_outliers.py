"""Virtual outliers against the released code's numbers, a plain computation, and their rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graftune
from graftune.adapters.base.messages import _warned
from graftune.adapters.regularizers import outlier_loss, virtual_outliers
from graftune.adapters.regularizers.outlier_regularizer import VirtualOutliers
from graftune.adapters.regularizers.outliers import kth_distance
from graftune.adapters.regularizers.session import Regularization

GOLDEN = Path(__file__).parents[2] / "golden"


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("default", {}),
        ("mse", {"huber": False}),
        ("t2", {"inside_energy": -12.0, "outside_energy": -6.0, "weight": 0.7}),
    ],
)
def test_golden_loss(case: str, options: dict[str, Any]) -> None:
    stored = np.load(GOLDEN / "ovor_npos_loss.npz")
    arrays = {name: torch.from_numpy(stored[name]) for name in stored}
    inside = arrays["id_logits"].requires_grad_()
    outside = arrays["ood_logits"].requires_grad_()
    result = outlier_loss(inside, outside, **options)
    result.backward()
    exact = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(result.detach(), arrays[f"loss_{case}"], **exact)
    torch.testing.assert_close(inside.grad, arrays[f"grad_id_{case}"], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(outside.grad, arrays[f"grad_ood_{case}"], rtol=1e-9, atol=1e-15)


def plainly(
    features: torch.Tensor,
    noise: torch.Tensor,
    neighbours: int,
    select: int,
    per_class: int,
    center: str,
) -> torch.Tensor:
    """Every distance of every candidate, sorted."""
    own = torch.cdist(features, features).sort(1).values[:, neighbours - 1]
    boundary = features[own.topk(select).indices]
    searched = features
    if center == "origin":
        boundary = torch.zeros_like(boundary)
        searched = features / features.norm(dim=1, keepdim=True)
    candidates = (boundary[:, None] + noise).flatten(0, 1)
    kth = torch.cdist(candidates, searched).sort(1).values[:, neighbours - 1]
    return candidates[kth.sort(descending=True, stable=True).indices[:per_class]]


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    width=st.integers(1, 12),
    neighbours=st.integers(1, 12),
    select=st.integers(1, 12),
    samples=st.integers(4, 20),
    center=st.sampled_from(["boundary", "origin"]),
    seed=st.integers(0, 100),
)
@pytest.mark.filterwarnings("ignore:a class has")
def test_outliers_are_the_farthest_of_all_candidates(
    count: int, width: int, neighbours: int, select: int, samples: int, center: Any, seed: int
) -> None:
    features = torch.randn(count, width, dtype=torch.float64, generator=drawn(seed)) * 2 + 5
    result = virtual_outliers(
        features,
        neighbours=neighbours,
        select=select,
        samples=samples,
        sigma=0.5,
        per_class=4,
        center=center,
        generator=drawn(seed + 1),
    )
    noise = torch.randn(samples, width, dtype=torch.float64, generator=drawn(seed + 1)) * 0.5
    fewer = min(neighbours, count), min(select, count)
    expected = plainly(features, noise, *fewer, per_class=4, center=center)
    assert result.shape == (4, width)
    searched = features if center == "boundary" else torch.nn.functional.normalize(features)
    torch.testing.assert_close(
        kth_distance(result, searched, fewer[0]), kth_distance(expected, searched, fewer[0])
    )


def test_outliers_themselves_are_those_of_the_plain_computation() -> None:
    features = torch.randn(80, 16, dtype=torch.float64, generator=drawn(3))
    noise = torch.randn(50, 16, dtype=torch.float64, generator=drawn(4)) * 0.3
    for center in ("boundary", "origin"):
        result = virtual_outliers(
            features,
            neighbours=5,
            select=10,
            samples=50,
            sigma=0.3,
            per_class=25,
            center=center,
            generator=drawn(4),
        )
        expected = plainly(features, noise, 5, 10, 25, center)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


def test_several_classes_are_one_after_the_other() -> None:
    features = torch.randn(3, 60, 8, generator=drawn())
    together = virtual_outliers(features, generator=drawn(1))
    generator = drawn(1)
    for of_class, outliers in zip(features, together, strict=True):
        torch.testing.assert_close(virtual_outliers(of_class, generator=generator), outliers)
    assert together.shape == (3, 40, 8)


def test_few_features_are_said_once() -> None:
    _warned.discard("virtual outliers: few features")
    with pytest.warns(UserWarning, match="a class has 7 features, fewer than neighbours=50"):
        result = virtual_outliers(torch.randn(7, 5))
    assert result.shape == (40, 5)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.zeros(0, 4), {}, "at least one image"),
        (torch.zeros(4), {}, "features must be"),
        (torch.full((60, 4), torch.nan), {}, "features must be finite"),
        (torch.zeros(60, 4), {"neighbours": 0}, "`neighbours` must be a whole number"),
        (torch.zeros(60, 4), {"sigma": 0.0}, "`sigma` must be greater than 0"),
        (torch.zeros(60, 4), {"center": "mean"}, "`center` is 'boundary' or 'origin'"),
        (torch.zeros(60, 4), {"per_class": 40, "samples": 1, "select": 2}, "per_class=40 is more"),
        (torch.zeros(1, 4), {"per_class": 40, "samples": 2}, "of 1 boundary features times"),
    ],
)
@pytest.mark.filterwarnings("ignore:a class has")
def test_bad_input(features: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        virtual_outliers(features, **options)


def prepared(labels: torch.Tensor, **fields: Any) -> tuple[VirtualOutliers, torch.nn.Linear]:
    regularizer = VirtualOutliers(neighbours=3, select=3, samples=5, per_class=2, **fields)
    head = torch.nn.Linear(6, 5)
    regularizer.prepare(torch.randn(len(labels), 6), labels, head=head, generator=drawn())
    return regularizer, head


def test_the_regularizer_is_the_loss_on_the_classes_of_the_task() -> None:
    torch.manual_seed(0)
    regularizer, head = prepared(torch.tensor([3, 4] * 6), weight=0.5)
    batch = torch.randn(4, 6)

    def objective(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(x), "loss": model(x).new_zeros(())}

    losses = Regularization(head, [regularizer])(objective, head, {"x": batch})
    outliers = regularizer.state_dict()["outliers"]
    assert outliers.shape == (4, 6)
    expected = outlier_loss(head(batch)[:, 3:], head(outliers)[:, 3:], weight=0.5)
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    assert not head.weight.grad[:3].any()
    assert head.weight.grad[3:].any()


def test_the_regularizer_acts_between_prepare_and_clear() -> None:
    regularizer, head = prepared(torch.tensor([0, 1] * 6))
    step = graftune.adapters.regularizers.Step(head, {"logits": head(torch.randn(4, 6))})
    assert set(regularizer.terms(step)) == {"virtual_outliers"}
    again, _ = prepared(torch.tensor([0, 1] * 6))
    again.load_state_dict(regularizer.state_dict())
    torch.testing.assert_close(again.state_dict(), regularizer.state_dict())
    regularizer.clear()
    assert regularizer.terms(step) == {}
    _warned.discard("virtual outliers: not prepared")
    with pytest.warns(UserWarning, match="had no part in this run"):
        regularizer.end(graftune.adapters.regularizers.Run(head, 1, 1))


def test_bad_settings_of_the_regularizer() -> None:
    with pytest.raises(ValueError, match="`weight` must be at least 0"):
        VirtualOutliers(weight=-1)
    with pytest.raises(ValueError, match="`outlier_center` is 'boundary' or 'origin'"):
        VirtualOutliers(outlier_center="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one label for each row"):
        VirtualOutliers().prepare(torch.zeros(3, 2), torch.zeros(2), head=torch.nn.Linear(2, 2))

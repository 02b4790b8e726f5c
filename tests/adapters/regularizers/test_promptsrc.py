"""PromptSRC's regularizers: the numbers of the authors' released code, and resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.adapters.regularizers import (
    GaussianAveraging,
    Regularization,
    SelfRegulation,
    gaussian_weights,
    self_regulation_loss,
)
from graftune.adapters.regularizers.state_file import load_state, save_state
from graftune.adapters.regularizers.templates import GENERAL_TEMPLATES

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = [(20, 15, 1), (50, 30, 30), (5, 4, 2), (50, 45, 5), (20, 6, 10)]


def golden(name: str) -> dict[str, Tensor]:
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_self_regulation_loss_and_its_gradients() -> None:
    given = golden("promptsrc_loss")
    names = ("logits", "text_features", "image_features")
    logits, text, image = (given[name].requires_grad_() for name in names)
    loss = self_regulation_loss(
        logits,
        given["zero_shot_logits"],
        text,
        given["fixed_text_features"],
        image,
        given["fixed_image_features"],
        text_weight=float(given["text_weight"]),
        image_weight=float(given["image_weight"]),
    )
    near(loss, given["loss_text"] + given["loss_image"] + given["loss_kl"])
    total = F.cross_entropy(logits, given["label"]) + loss
    near(total, given["loss_total"])
    total.backward()
    for name in names:
        near(given[name].grad, given[f"grad_{name}"])


@pytest.mark.parametrize(("epochs", "mean", "std"), CASES)
def test_gaussian_weights(epochs: int, mean: float, std: float) -> None:
    expected = golden("promptsrc_gpa")[f"weights_N{epochs}_m{mean}_s{std}"]
    near(gaussian_weights(epochs, mean, std), expected)


@pytest.mark.parametrize(("epochs", "mean", "std"), CASES)
@pytest.mark.parametrize("resumed_after", [None, 2])
def test_gaussian_averaging(
    epochs: int, mean: float, std: float, resumed_after: int | None, tmp_path: Path
) -> None:
    case = f"N{epochs}_m{mean}_s{std}"
    given = golden("promptsrc_gpa")
    model = nn.Linear(7, 1, bias=False, dtype=torch.float64)

    def session() -> Regularization:
        regularization = Regularization(model, [GaussianAveraging(mean, std)])
        regularization.start(steps=epochs, epochs=epochs)
        return regularization

    run = session()
    for epoch, weights in enumerate(given[f"epoch_params_{case}"], start=1):
        model.weight.data = weights[None].clone()
        run.epoch_end()
        assert torch.equal(model.weight.data[0], weights)
        if epoch == resumed_after:
            save_state(run.state_dict(), tmp_path / "state.safetensors")
            run = session()
            run.load_state_dict(load_state(tmp_path / "state.safetensors"))
    run.end()
    near(model.weight.data[0], given[f"aggregated_{case}"])


def test_a_run_that_ends_early_averages_what_there_was() -> None:
    model = nn.Linear(1, 1, bias=False)
    run = Regularization(model, [GaussianAveraging(mean=1, std=10)])
    run.start(steps=10, epochs=10)
    for value in (1.0, 3.0):
        model.weight.data.fill_(value)
        run.epoch_end()
    run.end()
    first, second = gaussian_weights(10, 1, 10)[:2].tolist()
    assert model.weight.item() == pytest.approx((first + 3 * second) / (first + second))


def test_weights_do_not_vanish_far_from_the_mean() -> None:
    weights = gaussian_weights(3, mean=500, std=1)
    assert weights.sum() == 1
    assert weights.argmax() == 2


@pytest.mark.parametrize(("epochs", "std"), [(0, 1.0), (3, 0.0), (3, -1.0)])
def test_bad_settings(epochs: int, std: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        gaussian_weights(epochs, 1, std)


def test_bad_weights_and_templates() -> None:
    with pytest.raises(ValueError, match="`image_weight` must be at least 0"):
        SelfRegulation(image_weight=-1)
    with pytest.raises(ValueError, match="needs exactly one"):
        SelfRegulation(templates=["a photo"])


def test_the_general_templates() -> None:
    assert len(GENERAL_TEMPLATES) == len(set(GENERAL_TEMPLATES)) == 60
    assert all(text.count("{}") == 1 for text in GENERAL_TEMPLATES)

"""Regularizers towards the previous task: its weights, its Fisher information, its outputs."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import graftune
from graftune.adapters.base.classifier import grow_classifier
from graftune.adapters.base.frozen import as_adapter
from graftune.adapters.regularizers import (
    ElasticWeightConsolidation,
    L2ToStart,
    PreviousDistillation,
    Regularization,
    diagonal_fisher,
)
from graftune.adapters.regularizers.functional import distillation
from graftune.integrations.objectives import ImageClassifier
from support.models import MODELS

CASE = MODELS["transformers-vit"]
METHODS = {
    "ovor": graftune.OnePromptConfig(lengths=[4], modules_to_save=["classifier"]),
    "coda_prompt": graftune.CodaPromptConfig(
        pool_size=4, tasks=2, prompt_blocks=[0], modules_to_save=["classifier"]
    ),
    "flora": graftune.FloraConfig(r=2, modules_to_save=["classifier"]),
    "lora": peft.LoraConfig(
        target_modules=["k_proj"], init_lora_weights=False, modules_to_save=["classifier"]
    ),
}


def wrapped(method: str) -> Any:
    torch.manual_seed(0)
    return graftune.wrap(CASE.build(), METHODS[method])


def batch() -> dict[str, Tensor]:
    return {**CASE.batch(), "labels": torch.tensor([0, 1, 2, -100])}


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("of", ["logits", "features"])
def test_the_previous_model_is_a_second_adapter(method: str, of: Any) -> None:
    model, objective = wrapped(method), ImageClassifier()
    regularizer = PreviousDistillation(0.5, of=of)
    losses = Regularization(model, [regularizer])
    assert losses(objective, model, batch())["terms"] == {}
    with torch.no_grad():
        before = objective(model, **batch(), features=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    regularizer.keep(model, classes=5)
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    moved(model)
    grow_classifier(model, "classifier", 7)
    if of == "logits":
        now = objective(model, **batch())["logits"][:, :5]
        expected = distillation(now, before["logits"])[:3].mean()
        name = "previous_distillation"
    else:
        now = objective(model, **batch(), features=True)["features"]["image"]
        difference = (now - before["features"]["image"]).square().mean(1)
        expected, name = difference[:3].mean(), "previous_distillation_image"
    terms = losses(objective, model.train(), batch())["terms"]
    torch.testing.assert_close(terms[name], 0.5 * expected)
    terms[name].backward()
    assert all(".previous" not in n for n, p in model.named_parameters() if p.grad is not None)
    assert model.training
    assert model.active_adapter == "default"
    regularizer.forget(model)
    assert list(model.peft_config) == ["default"]


def test_what_is_kept_last_counts() -> None:
    model = wrapped("ovor")
    regularizer = PreviousDistillation()
    for _ in range(2):
        moved(model)
        with torch.no_grad():
            expected = model(**CASE.batch()).logits
        regularizer.keep(model)
    moved(model)
    with as_adapter(model, "previous"):
        torch.testing.assert_close(model(**CASE.batch()).logits, expected, rtol=0, atol=0)


def test_no_objective_and_no_adapter() -> None:
    model = wrapped("ovor")
    regularizer = PreviousDistillation()
    regularizer.keep(model)
    step = graftune.adapters.regularizers.Step(model, {})
    with pytest.raises(ValueError, match="give the trainer `objective="):
        regularizer.terms(step)
    with (
        pytest.raises(ValueError, match="has an adapter 'nothing'"),
        as_adapter(model, "nothing"),
    ):
        pass


def test_the_fisher_information_of_a_linear_model() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 3), torch.randn(3, requires_grad=True)
    result = diagonal_fisher([x[:2] @ w, x[2:] @ w], {"w": w})
    torch.testing.assert_close(result["w"], x.square().mean(0))
    with pytest.raises(ValueError, match="there were none"):
        diagonal_fisher([], {"w": w})


def test_weights_that_earlier_tasks_needed_are_held() -> None:
    model, objective = wrapped("ovor"), ImageClassifier()
    regularizer = ElasticWeightConsolidation(3.0, decay=0.5)
    losses = Regularization(model, [regularizer])
    assert losses(objective, model, batch())["terms"] == {}
    regularizer.consolidate(model, objective, [batch(), batch()])
    first = {name: f.clone() for name, f in regularizer.state_dict()["fisher"].items()}
    assert set(first) == {n for n, p in model.named_parameters() if p.requires_grad}
    grow_classifier(model, "classifier", 7)
    moved(model)
    regularizer.consolidate(model, objective, [batch()])
    state = regularizer.state_dict()
    moved(model)
    expected = torch.zeros(())
    for name, parameter in model.named_parameters():
        if name in state["fisher"]:
            distance = (parameter - state["weights"][name]).square()
            expected = expected + 1.5 * (state["fisher"][name] * distance).sum()
    term = losses(objective, model, batch())["terms"]["ewc"]
    torch.testing.assert_close(term, expected.detach())
    head = next(name for name in first if name.endswith("default.weight"))
    assert (state["fisher"][head][:5] >= 0.5 * first[head]).all()
    again = ElasticWeightConsolidation(3.0)
    again.load_state_dict(state)
    torch.testing.assert_close(
        again.terms(graftune.adapters.regularizers.Step(model, {}))["ewc"], term
    )


def test_one_gradient_an_image() -> None:
    model, objective = wrapped("ovor"), ImageClassifier()
    regularizer = ElasticWeightConsolidation()
    regularizer.consolidate(model, objective, [batch()])
    fisher = regularizer.state_dict()["fisher"]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(3):
        one = {name: tensor[row : row + 1] for name, tensor in batch().items()}
        loss = objective(model, **one)["loss"]
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(sums, gradients, strict=True):
            sums[name] += gradient.square() / 3
    for name, expected in sums.items():
        torch.testing.assert_close(fisher[name], expected)


def test_l2_to_the_previous_task_is_l2_to_the_start_of_a_run() -> None:
    model = wrapped("ovor")
    grow_classifier(model, "classifier", 7)
    losses = Regularization(model, [L2ToStart(2.0)])
    losses.start(steps=1, epochs=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    moved(model)
    expected = sum(
        (p - before[n]).square().sum() for n, p in model.named_parameters() if n in before
    )
    terms = losses(ImageClassifier(), model, batch())["terms"]
    torch.testing.assert_close(terms["l2_to_start"], expected)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="`weight` must be at least 0"):
        ElasticWeightConsolidation(-1)
    with pytest.raises(ValueError, match="`decay` must be from 0 to 1"):
        ElasticWeightConsolidation(decay=2)
    with pytest.raises(ValueError, match="`temperature` must be greater than 0"):
        PreviousDistillation(temperature=0)

"""The first two regularizers against their equations, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn

import graftune
from graftune.adapters.base.weights import weight_changes
from graftune.adapters.regularizers import (
    FrozenDistillation,
    L2ToStart,
    Regularization,
    Run,
    Step,
    regularizer,
)
from graftune.adapters.regularizers.functional import distillation
from graftune.adapters.regularizers.l2_to_start import l2_to_start
from support.models import SmallCNN


def trained(method: str) -> nn.Module:
    torch.manual_seed(0)
    if method == "lora":
        config = LoraConfig(r=2, target_modules=["dilated", "head"], init_lora_weights=False)
        return get_peft_model(SmallCNN(), config)
    return graftune.wrap(SmallCNN(), "flora", r=2, init_weights=False)


def step(model: nn.Module, **outputs: Any) -> Step:
    return Step(model=model, outputs=outputs, frozen=outputs.pop("frozen", None))


@given(st.integers(1, 3), st.integers(2, 5), st.floats(0.25, 4), st.integers(0, 2**31))
def test_distillation_is_the_scaled_divergence(
    rows: int, classes: int, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, z0 = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64).float()
    p, q = (F.softmax(v.double() / temperature, dim=-1) for v in (z, z0))
    expected = temperature**2 * (q * (q.log() - p.log())).sum(-1)
    torch.testing.assert_close(
        distillation(z, z0, temperature).double(), expected, rtol=1e-4, atol=1e-5
    )
    assert (distillation(z, z) == 0).all()


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_l2_of_the_adapter_pulls_towards_the_start(method: str) -> None:
    model = trained(method)
    term = L2ToStart(weight=0.5)
    term.start(Run(model, steps=1, epochs=1))
    assert term.terms(step(model))["l2_to_start"] == 0
    own = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in own:
            parameter.add_(0.1)
    value = term.terms(step(model))["l2_to_start"]
    assert value.item() == pytest.approx(0.5 * 0.5 * 0.01 * sum(p.numel() for p in own), rel=1e-4)
    value.backward()
    for parameter in own:
        torch.testing.assert_close(
            parameter.grad, torch.full_like(parameter, 0.05), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_l2_of_the_merged_weights_is_their_distance_to_the_base(method: str) -> None:
    model = trained(method)
    term = L2ToStart(weight=2.0, of="merged")
    term.check(model)
    value = term.terms(step(model))["l2_to_start"]
    value.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    before = {n: p.clone() for n, p in model.get_base_model().named_parameters()}
    model.merge_adapter()
    after = dict(model.get_base_model().named_parameters())
    distance = sum((after[n] - p).square().sum() for n, p in before.items() if "ora_" not in n)
    assert value.item() == pytest.approx(float(distance), rel=1e-4)


def test_l2_of_the_merged_weights_keeps_the_precision_of_float64() -> None:
    model = trained("flora").double()
    value = L2ToStart(weight=2.0, of="merged").terms(step(model))["l2_to_start"]
    squares = [float(change().square().sum()) for _, change in weight_changes(model)]
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(sum(squares), rel=1e-14)


def test_weight_changes_are_named_by_the_bare_model() -> None:
    names = {name for name, _ in weight_changes(trained("lora"))}
    assert names == {"dilated.weight", "head.weight"}


def test_a_method_that_does_not_add_is_refused() -> None:
    model = get_peft_model(SmallCNN(), OFTConfig(target_modules=["head"], oft_block_size=4))
    with pytest.raises(TypeError, match="does not add to the weight"):
        L2ToStart(of="merged").check(model)
    L2ToStart().check(model)


def test_the_mask_and_the_items_decide_what_counts() -> None:
    model = nn.Linear(1, 1)
    values = torch.tensor([[1.0, 2.0, 100.0]])
    mask = torch.tensor([[True, True, False]])
    assert Step(model, {}).mean(values, mask).item() == 1.5
    accumulated = Step(model, {}, items=6, processes=2, share=0.5)
    # 3 of a sum over all, times the processes that are averaged, over the share that follows.
    assert accumulated.mean(values, mask).item() == pytest.approx(3 / 6 * 2 / 0.5)


def test_distillation_of_features_and_outputs() -> None:
    features = {"image": torch.ones(2, 3), "text": torch.zeros(4, 3)}
    frozen = {"image": torch.zeros(2, 3), "text": torch.zeros(4, 3)}
    terms = FrozenDistillation(2.0, of="features").terms(
        step(nn.Linear(1, 1), features=features, frozen={"features": frozen})
    )
    assert {name: float(v) for name, v in terms.items()} == {
        "frozen_distillation_image": 2.0,
        "frozen_distillation_text": 0.0,
    }
    outputs = FrozenDistillation(3.0, of="outputs").terms(
        step(nn.Linear(1, 1), logits=torch.ones(2, 4, 3), frozen={"logits": torch.zeros(2, 4, 3)})
    )
    assert outputs["frozen_distillation"].item() == 3.0


def test_features_of_classes_are_not_left_out_with_the_pictures_beside_them() -> None:
    # As many classes as pictures, of which the second has no label that counts.
    outputs = {
        "mask": torch.tensor([True, False]),
        "features": {"image": torch.tensor([[1.0], [3.0]]), "text": torch.tensor([[1.0], [3.0]])},
    }
    frozen = {"features": {"image": torch.zeros(2, 1), "text": torch.zeros(2, 1)}}
    given = Step(nn.Linear(1, 1), outputs, frozen, objective=graftune.ClassNameClassifier)
    terms = FrozenDistillation(of="features").terms(given)
    assert terms["frozen_distillation_image"].item() == 1.0
    assert terms["frozen_distillation_text"].item() == 5.0


def test_a_taken_name_is_refused_and_the_first_class_stays() -> None:
    with pytest.raises(ValueError, match=r"'l2_to_start' is taken by .*L2ToStart; give .*Mine"):

        class Mine(L2ToStart):
            name = "l2_to_start"

    assert type(regularizer({"name": "l2_to_start"})) is L2ToStart


def test_a_class_that_is_defined_again_takes_over() -> None:
    def define() -> type[L2ToStart]:
        class Again(L2ToStart):
            name = "test_again"

        return Again

    _, newest = define(), define()
    assert type(regularizer({"name": "test_again"})) is newest


def test_terms_of_one_name_are_refused() -> None:
    class Other(L2ToStart):
        name = "test_other_l2"

        def terms(self, step: Step) -> Any:
            return {"l2_to_start": torch.zeros(())}

    session = Regularization(trained("lora"), [L2ToStart(), Other()])
    session.start(steps=1, epochs=1)
    with pytest.raises(ValueError, match=r"more than one regularizer has a term .*'l2_to_start'"):
        session.losses(lambda: {"loss": torch.zeros(())})


def test_missing_outputs_are_named() -> None:
    with pytest.raises(ValueError, match="needs 'logits', and the objective returned only"):
        FrozenDistillation().terms(step(nn.Linear(1, 1), loss=torch.ones(1), frozen={}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "l2_to_stat"}, "Did you mean 'l2_to_start'"),
        ({"name": "l2_to_start", "wieght": 1}, "Did you mean 'weight'"),
        ({"name": "l2_to_start", "weight": -1}, "at least 0"),
        ({"name": "frozen_distillation", "temperature": 0}, "greater than 0"),
        ({"name": "frozen_distillation", "of": "logit"}, "'logits', 'outputs' or 'features'"),
        ({"weight": 1}, "dict with its 'name'"),
        ("l2_to_start", "dict with its 'name'"),
    ],
)
def test_bad_settings_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regularizer(values)


def test_l2_is_a_pure_function() -> None:
    weights: list[Tensor] = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    assert l2_to_start(weights, [torch.zeros(2), torch.zeros(())]).item() == 7.0

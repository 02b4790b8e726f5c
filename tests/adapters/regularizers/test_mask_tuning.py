"""R-AMT's regularizers: the numbers of the authors' released code, and what is applied when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import graftune
from graftune.adapters.regularizers import (
    GradientDropout,
    MaskNorm,
    Regularization,
    Regularizer,
    Run,
    Step,
    gradient_dropout,
    mask_norm,
    regularizer,
)
from graftune.adapters.regularizers.state_file import load_state, save_state

GOLDEN = Path(__file__).parents[2] / "golden"
X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def golden() -> dict[str, Tensor]:
    values = np.load(GOLDEN / "ramt_losses.npz")
    return {name: torch.from_numpy(np.asarray(value)) for name, value in values.items()}


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1, 2])
def test_the_divergence_is_that_of_the_released_code(temperature: int) -> None:
    numbers = golden()
    z, z0 = numbers["student_logits"].requires_grad_(), numbers["teacher_logits"]
    step = Step(nn.Identity(), {"logits": z}, {"logits": z0})
    value = GradientDropout(temperature=temperature).separate_terms(step)["gradient_dropout"]
    value.backward()
    near(z.grad, numbers[f"kl_grad_T{temperature}_alpha1"])
    # There the entropy of the frozen model, which is constant, is not subtracted.
    log_q = (z0 / temperature).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1).mean() * temperature**2
    near(value + entropy, numbers[f"kl_T{temperature}_alpha1"])


def test_the_norm_is_that_of_the_released_code() -> None:
    numbers = golden()
    scores = numbers["reg_param"].requires_grad_()
    value = mask_norm([scores])
    value.backward()
    near(value, numbers["reg_k2"])
    near(scores.grad, numbers["reg_grad_k2"])


numbers = st.floats(-1e3, 1e3).map(lambda x: x if abs(x) > 1e-3 else 0.0)


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 0.999)), min_size=1), st.floats(0, 1))
def test_gradient_dropout_is_its_equation(rows: list[Any], weight: float) -> None:
    g, k, u = torch.tensor(rows, dtype=torch.float64).T
    result = gradient_dropout(g, k, u, weight)
    for got, (task, frozen, uniform) in zip(result.tolist(), rows, strict=True):
        agreement = np.sign(task) * (task + frozen) / (abs(task) + abs(frozen) + 1e-8)
        kept = (1 + agreement) / 2 > uniform
        assert got == pytest.approx(task if kept else (1 - weight) * task, rel=1e-12)
        if task * frozen > 0:  # agreement is never dropped
            assert got == task
    scaled = gradient_dropout(1024 * g, 1024 * k, u, weight)
    assert torch.allclose(scaled, 1024 * result)


@given(st.floats(0.01, 10), st.integers(0, 2**31))
def test_what_disagrees_is_kept_as_often_as_its_share(ratio: float, seed: int) -> None:
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(seed))
    g = torch.ones(10_000)
    kept = gradient_dropout(g, -ratio * g, uniform, weight=1.0).mean().item()
    assert kept == pytest.approx(1 / (1 + ratio), abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_gradients_in_half_precision_stay_numbers(dtype: torch.dtype) -> None:
    g = torch.tensor([0.0, 0.0, 6e-8, -6e-8, 1.0], dtype=dtype)
    k = torch.tensor([0.0, -1.0, 0.0, 6e-8, -1e-7], dtype=dtype)
    result = gradient_dropout(g, k, torch.full((5,), 0.4), weight=0.5)
    assert result.dtype == dtype
    assert torch.equal(result, g)


# At work, on any adapter.


def model_of(method: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    if method == "lora":
        model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
    else:
        model = graftune.wrap(net, "flora", r=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def outputs(model: nn.Module, rows: slice = slice(None)) -> dict[str, Tensor]:
    logits = model(X[rows].to(next(model.parameters()).dtype))
    return {"logits": logits, "loss": nn.functional.cross_entropy(logits, Y[rows])}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return Run(model, 0, 0).trained()


def gradients(
    model: nn.Module, regularizers: list[Regularizer], scale: float = 1.0, batches: int = 1
) -> dict[str, Tensor]:
    """The gradients of one optimizer step, as a training loop gets them."""
    torch.manual_seed(11)
    session = Regularization(model, regularizers)
    session.start(steps=1, epochs=1)
    model.zero_grad()
    rows = len(X) // batches
    for number in range(batches):
        part = slice(number * rows, (number + 1) * rows)

        def forward(part: slice = part) -> dict[str, Tensor]:
            found = outputs(model, part)
            return {**found, "loss": found["loss"] / batches}

        losses = session.losses(forward, share=1 / batches, gradient_scale=scale)
        (scale * losses["loss"]).backward()
    session.transform_gradients(scale)
    return {name: p.grad / scale for name, p in trained(model).items()}


def by_hand(model: nn.Module, weight: float) -> tuple[Any, Any, Any, Any]:
    """g, k, the gradient n of L2ToStart's term at a distance of one, and u, by name."""
    dropout = GradientDropout(weight)
    torch.manual_seed(11)
    dropout.start(Run(model, 1, 1, seed=11))
    generator = dropout._generator(torch.device("cpu"))
    own = trained(model)
    with torch.no_grad(), model.disable_adapter():
        frozen = outputs(model)["logits"]
    here = outputs(model)
    p, q = here["logits"].log_softmax(-1), frozen.log_softmax(-1)
    divergence = (q.exp() * (q - p)).sum(-1).mean()
    g = torch.autograd.grad(here["loss"], own.values(), retain_graph=True)
    k = torch.autograd.grad(divergence, own.values())
    u = [torch.rand(p.shape, generator=generator) for p in own.values()]
    return tuple(dict(zip(own, values, strict=True)) for values in (g, k, g, u))


@pytest.mark.parametrize("method", ["lora", "flora"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_only_the_gradient_of_the_task_is_applied(method: str, weight: float) -> None:
    model = model_of(method)
    g, k, _, u = by_hand(model, weight)
    found = gradients(model, [GradientDropout(weight)])
    dropped = 0
    for name, gradient in found.items():
        near(gradient, gradient_dropout(g[name], k[name], u[name], weight))
        dropped += int((gradient != g[name]).sum())
    assert dropped > 0


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_other_terms_are_added_undropped_whatever_the_order(order: slice) -> None:
    model = model_of("flora")
    alone = gradients(model, [GradientDropout(0.5)])
    g, k, _, u = by_hand(model, 0.5)
    own = [GradientDropout(0.5), Pull()][order]
    for name, gradient in gradients(model, own).items():
        near(gradient, alone[name] + 2 * trained(model)[name].detach())
    own = [GradientDropout(0.5, of="loss"), Pull()][order]
    for name, gradient in gradients(model, own).items():
        both = g[name] + 2 * trained(model)[name].detach()
        near(gradient, gradient_dropout(both, k[name], u[name], 0.5))


class Pull(Regularizer):
    """The sum of the squares of the weights."""

    name = "test_pull"
    reads_outputs = False

    def terms(self, step: Step) -> dict[str, Tensor]:
        return {"pull": torch.stack([p.square().sum() for p in trained(step.model).values()]).sum()}


def test_the_loss_has_the_terms_in_it() -> None:
    model = model_of("flora")
    session = Regularization(model, [GradientDropout(0.5), Pull()])
    session.start(steps=1, epochs=1)
    losses = session.losses(lambda: outputs(model))
    assert set(losses["terms"]) == {"pull"}
    near(losses["loss"], losses["task_loss"] + losses["terms"]["pull"])


@pytest.mark.parametrize("options", [{"scale": 2.0**16}, {"batches": 3}])
def test_scaled_and_accumulated_gradients_are_dropped_alike(options: dict[str, Any]) -> None:
    model = model_of("lora")
    chosen = [GradientDropout(1.0), Pull()]
    plain = gradients(model, chosen)
    for name, gradient in gradients(model, chosen, **options).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-12)


def test_steps_draw_anew_and_resumed_ones_the_same(tmp_path: Path) -> None:
    model = model_of("flora")

    def session(seed: int) -> Regularization:
        torch.manual_seed(seed)
        made = Regularization(model, [GradientDropout(1.0)])
        made.start(steps=3, epochs=1)
        return made

    def step(run: Regularization) -> Tensor:
        model.zero_grad()
        run.losses(lambda: outputs(model))["loss"].backward()
        run.transform_gradients()
        return torch.cat([p.grad.flatten() for p in trained(model).values()])

    run = session(1)
    first = step(run)
    save_state(run.state_dict(), tmp_path / "state.safetensors")
    second, third = step(run), step(run)
    resumed = session(2)
    resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert torch.equal(step(resumed), second)
    assert torch.equal(step(resumed), third)
    assert torch.equal(step(session(1)), first)
    assert not torch.equal(first, second)
    assert not torch.equal(step(session(2)), first)


def test_weights_that_the_divergence_does_not_reach_keep_their_gradient() -> None:
    model = model_of("lora")
    head = nn.Linear(8, 3, dtype=torch.float64)
    model.add_module("aside", head)
    session = Regularization(model, [GradientDropout(1.0)])
    session.start(steps=1, epochs=1)

    def forward() -> dict[str, Tensor]:
        found = outputs(model)
        return {**found, "loss": found["loss"] + head.weight.sum()}

    session.losses(forward)["loss"].backward()
    session.transform_gradients()
    assert torch.equal(head.weight.grad, torch.ones_like(head.weight))


class Masked(nn.Module):
    """A layer with the scores of two masks, of which one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_tuning_scores = nn.ParameterDict({"default": torch.full((2, 2), 0.5)})
        self.mask_tuning_scores["frozen"] = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unmask_tuning_weight = nn.Parameter(torch.ones(3))


def test_mask_norm_finds_the_masks() -> None:
    model = nn.Sequential(Masked(), Masked())
    MaskNorm().check(model)
    term = MaskNorm(weight=0.25).terms(Step(model, outputs={}))["mask_norm"]
    assert term.item() == 0.25 * 2 * 1.0
    with pytest.raises(TypeError, match=r"begins with 'mask_tuning_'; wrap it with 'mask_tuning'"):
        MaskNorm().check(model_of("flora"))
    hollow = Masked()
    hollow.mask_tuning_scores["default"] = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="MaskNorm measures weights, and those of this process"):
        MaskNorm().check(hollow)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "gradient_dropout", "weight": 1.5}, "from 0 to 1, got 1.5"),
        ({"name": "gradient_dropout", "weight": -0.1}, "from 0 to 1"),
        ({"name": "gradient_dropout", "weight": float("nan")}, "from 0 to 1"),
        ({"name": "gradient_dropout", "temperature": 0}, "greater than 0"),
        ({"name": "gradient_dropout", "of": "both"}, "'task' or 'loss'"),
        ({"name": "mask_norm", "weight": -1}, "at least 0"),
        ({"name": "mask_nrom"}, "Did you mean 'mask_norm'"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regularizer(values)


def test_without_logits_there_is_nothing_to_compare() -> None:
    step = Step(nn.Identity(), {"loss": torch.zeros(())}, {"loss": torch.zeros(())})
    with pytest.raises(ValueError, match="GradientDropout needs 'logits'"):
        GradientDropout().separate_terms(step)

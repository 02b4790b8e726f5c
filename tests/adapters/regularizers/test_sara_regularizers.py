"""Nuclear norm and progressive release: their numbers, errors, and resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor, nn

import graftune
from graftune import NuclearNorm, ProgressiveRelease, Regularization
from graftune.adapters.base.sparse_parts import sparse_parts
from graftune.adapters.regularizers import nuclear_norm_and_gradient
from graftune.adapters.regularizers.base import Run, Step
from graftune.adapters.regularizers.nuclear import polar_factor


def matrix_of(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = values.numel()
    u = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))[0]
    return (u * values.double()) @ v.T


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 2**31),
    st.sampled_from(["svd", "polar"]),
)
def test_norm_and_gradient_are_those_of_autograd(
    rows: int, columns: int, seed: int, method: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Away from zero: there the gradient is not unique.
    values = 0.5 + torch.rand(min(rows, columns), generator=generator).double()
    matrix = matrix_of(values, rows, columns, seed).requires_grad_()
    expected = torch.linalg.matrix_norm(matrix, "nuc")
    expected.backward()
    norm, gradient = nuclear_norm_and_gradient(matrix, None, method)
    torch.testing.assert_close(norm, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, matrix.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", ["svd", "polar"])
def test_the_gradient_is_on_the_mask_alone(method: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 90, dtype=torch.float64)
    mask = torch.rand(70, 90) < 0.3
    norm, gradient = nuclear_norm_and_gradient(weight, mask, method)
    u, values, vt = torch.linalg.svd(weight * mask, full_matrices=False)
    torch.testing.assert_close(norm, values.sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, (u @ vt) * mask, rtol=1e-7, atol=1e-9)
    assert not gradient[~mask].any()


@pytest.mark.parametrize("method", ["svd", "polar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_full_rank_the_smallest_subgradient(method: Any, dtype: torch.dtype) -> None:
    matrix = matrix_of(torch.tensor([3.0, 2.0, 1.0]), 20, 30).to(dtype)
    norm, gradient = nuclear_norm_and_gradient(matrix, None, method)
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert float(norm) == pytest.approx(6, rel=1e-5)
    expected = (u[:, :3] @ vt[:3]).to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=5e-3 if method == "polar" else 1e-5)
    zero, nothing = nuclear_norm_and_gradient(torch.zeros(4, 5, dtype=dtype), None, method)
    assert float(zero) == 0
    assert not nothing.any()


@pytest.mark.parametrize("shape", [(256, 256), (100, 700), (700, 100)])
@pytest.mark.parametrize("smallest", [0.3, 1e-3, 1e-7])
def test_the_iterations_error_is_within_its_bound(shape: tuple[int, int], smallest: float) -> None:
    side = min(shape)
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), side)
    matrix = matrix_of(values, *shape).float()
    exact = torch.linalg.svdvals(matrix.double()).sum()
    norm, factor = nuclear_norm_and_gradient(matrix, None, "polar")
    wide = matrix.double() if shape[0] <= shape[1] else matrix.double().T
    p = factor.double() if shape[0] <= shape[1] else factor.double().T
    bound = side**0.5 * torch.linalg.matrix_norm(wide - p @ (p.T @ wide))
    rounding = 1e-5 * exact
    assert -rounding <= exact - norm.double() <= bound + rounding
    assert abs(float(norm) - float(exact)) <= 1e-3 * float(exact)
    assert torch.linalg.matrix_norm(p, 2) <= 1 + 1e-4


def test_random_sparse_matrices_agree_by_both_methods() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(300, 320) * (torch.rand(300, 320) < 0.1) * 2e-3
    norm, gradient = nuclear_norm_and_gradient(matrix)
    exact, expected = nuclear_norm_and_gradient(matrix, method="svd")
    assert float(norm) == pytest.approx(float(exact), rel=1e-4)
    # The smallest singular values' directions are the least certain.
    assert float((gradient - expected).norm() / expected.norm()) < 0.05
    assert torch.equal(polar_factor(matrix.T).T, polar_factor(matrix))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3),), "of a matrix"),
        ((torch.zeros(3, 3), torch.zeros(2, 3)), "the mask has the shape"),
        ((torch.zeros(3, 3), None, "qr"), "'auto', 'svd' or 'polar'"),
    ],
)
def test_what_has_no_nuclear_norm(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nuclear_norm_and_gradient(*arguments)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(70, 80), nn.ReLU(), nn.Linear(80, 66), nn.ReLU(), nn.Linear(66, 3)
    )


def adapted(**options: Any) -> nn.Module:
    return graftune.wrap(net(), "sara", **({"fraction": 0.2} | options))


def step_of(model: nn.Module) -> Step:
    return Step(model, {})


def test_one_matrix_a_step_is_drawn_and_its_entries_alone_have_a_gradient() -> None:
    model = adapted()
    regularizer = NuclearNorm(0.1)
    run = Run(model, 10, 1, seed=3)
    regularizer.start(run)
    seen = set()
    for _ in range(12):
        model.zero_grad()
        term = regularizer.terms(step_of(model))["nuclear_norm"]
        again = regularizer.terms(step_of(model))["nuclear_norm"]
        assert torch.equal(term, again)  # the same for all batches of a step
        term.backward()
        touched = [part for part in sparse_parts(model) if part.values.grad is not None]
        (part,) = touched
        seen.add(part.name)
        matrix = part.dense(part.values.detach())
        norm, gradient = nuclear_norm_and_gradient(matrix)
        torch.testing.assert_close(term.detach(), 0.1 * norm)
        torch.testing.assert_close(part.values.grad, 0.1 * part.entries(gradient))
        regularizer.step_end(run)
    assert len(seen) == 2  # the last layer's weight has too few rows, biases are vectors
    assert not any("4." in name for name in seen)


def test_all_matrices() -> None:
    model = adapted()
    total = NuclearNorm(2.0, of="all").terms(step_of(model))["nuclear_norm"]
    parts = [p for p in sparse_parts(model) if len(p.shape) == 2 and min(p.shape) > 64]
    expected = sum(nuclear_norm_and_gradient(p.dense(p.values.detach()))[0] for p in parts)
    torch.testing.assert_close(total.detach(), 2 * expected)


def test_drawn_matrices_go_on_after_resuming() -> None:
    model = adapted()
    run = Run(model, 10, 1, seed=3)
    whole, first, second = NuclearNorm(), NuclearNorm(), NuclearNorm()
    whole.start(run)
    draws = []
    for _ in range(10):
        draws.append(float(whole.terms(step_of(model))["nuclear_norm"].detach()))
        whole.step_end(run)
    first.start(run)
    for _ in range(4):
        first.step_end(run)
    second.start(Run(model, 10, 1, seed=99))
    second.load_state_dict(first.state_dict())
    for expected in draws[4:]:
        assert float(second.terms(step_of(model))["nuclear_norm"].detach()) == expected
        second.step_end(run)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularization: Regularization,
    steps: range,
) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 70, generator=generator)
        outputs = regularization.losses(lambda x=x: {"loss": model(x).square().mean()})
        optimizer.zero_grad()
        outputs["loss"].backward()
        regularization.transform_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        regularization.step_end()


def started(model: nn.Module, steps: int = 10) -> tuple[torch.optim.Optimizer, Regularization]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)
    regularization = Regularization(model, [NuclearNorm(), ProgressiveRelease()])
    regularization.start(steps, 1)
    return optimizer, regularization


@pytest.mark.parametrize("select", ["smallest", "largest", "random"])
def test_what_has_left_its_selection_stays(select: str) -> None:
    model = adapted(select=select)
    cutoff = model.peft_config["default"].cutoff
    optimizer, regularization = started(model)
    train(model, optimizer, regularization, range(5))
    at_release = {p.name: p.values.detach().clone() for p in sparse_parts(model)}
    train(model, optimizer, regularization, range(5, 10))
    frozen_in_all = 0
    for part in sparse_parts(model):
        before, after = at_release[part.name], part.values.detach()
        frozen = before.abs() >= cutoff if select == "smallest" else before.abs() <= cutoff
        if select == "random":
            frozen = torch.zeros_like(frozen)
        assert torch.equal(before[frozen], after[frozen])
        assert (before[~frozen] != after[~frozen]).all()
        frozen_in_all += int(frozen.sum())
    assert (frozen_in_all > 0) == (select != "random")


@pytest.mark.parametrize("after", [3, 5, 7])
def test_resumed_before_and_after_the_release_bit_for_bit(after: int) -> None:
    whole = adapted()
    train(whole, *started(whole), range(10))

    first = adapted()
    optimizer, regularization = started(first)
    train(first, optimizer, regularization, range(after))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), regularization.state_dict()))
    second = adapted()
    second.load_state_dict(saved[0])
    optimizer, regularization = started(second)
    optimizer.load_state_dict(saved[1])
    regularization.load_state_dict(saved[2])
    train(second, optimizer, regularization, range(after, 10))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_errors() -> None:
    for make, message in (
        (lambda: NuclearNorm(-1), "at least 0"),
        (lambda: NuclearNorm(of="some"), "'one' or 'all'"),
        (lambda: NuclearNorm(method="qr"), "'auto', 'svd' or 'polar'"),
        (lambda: ProgressiveRelease(1.0), "between 0 and 1"),
        (lambda: ProgressiveRelease(True), "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    lora = graftune.wrap(net(), LoraConfig(target_modules=["0"]))
    small = graftune.wrap(nn.Sequential(nn.Linear(8, 8)), "sara", fraction=0.5)
    for model, regularizer, message in (
        (lora, NuclearNorm(), "needs an adapter that trains entries of matrices"),
        (small, NuclearNorm(), "above 64"),
        (lora, ProgressiveRelease(), "needs an adapter that trains entries"),
    ):
        with pytest.raises(TypeError, match=message):
            Regularization(model, [regularizer]).check()

"""What the trainer and the regularizers rely on holds for every objective and model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import graftune
from graftune.integrations.objectives import (
    CausalLM,
    ClassNameClassifier,
    Denoising,
    ImageClassifier,
)
from support.clip import COLOURS, clip
from support.models import MODELS

SIZE = 6


@dataclass(frozen=True)
class Case:
    """An objective with a model, a batch of SIZE rows, and the names of its features."""

    model: str
    objective: Callable[[], Any]
    batch: Callable[[], dict[str, Any]]
    features: tuple[str, ...] = ()


def pictures(classes: int, side: int = 32) -> dict[str, Any]:
    labels = torch.arange(SIZE) % classes
    labels[1] = -100
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(SIZE, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "labels": labels}


def sentences() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 60, (SIZE, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 7, 2, 6])[:, None]).long()
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill(mask == 0, -100),
    }


def noised(model: str) -> dict[str, Any]:
    batch = MODELS[model].batch(SIZE)
    given = {"sample": batch.get("sample", batch.get("hidden_states"))}
    given |= {k: v for k, v in batch.items() if k in ("encoder_hidden_states", "class_labels")}
    generator = torch.Generator().manual_seed(3)
    given["noise"] = torch.randn(given["sample"].shape, generator=generator)
    given["timesteps"] = torch.randint(1000, (SIZE,), generator=generator)
    return given


def class_names(model: str) -> Callable[[], Any]:
    templates = ["a photo of a {}.", "a drawing of the {}"]
    return lambda: ClassNameClassifier(list(COLOURS), clip(model)[1], templates)


def denoising() -> Denoising:
    return Denoising(DDPMScheduler())


CASES = {
    case.model: case
    for case in (
        Case(
            "transformers-clip",
            class_names("transformers-clip"),
            lambda: pictures(4),
            ("image", "text"),
        ),
        Case("open_clip-vit", class_names("open_clip-vit"), lambda: pictures(4), ("image", "text")),
        Case("transformers-vit", ImageClassifier, lambda: pictures(5), ("image",)),
        Case("timm-vit", lambda: ImageClassifier(0.1), lambda: pictures(5), ("image",)),
        Case("timm-convnext", ImageClassifier, lambda: pictures(5, 64), ("image",)),
        Case("torch-cnn", ImageClassifier, lambda: pictures(5, 16), ("image",)),
        Case("transformers-llama", CausalLM, sentences, ("hidden",)),
        Case("transformers-gpt2", CausalLM, sentences, ("hidden",)),
        Case("diffusers-unet", denoising, lambda: noised("diffusers-unet"), ("mid",)),
        Case("diffusers-dit", denoising, lambda: noised("diffusers-dit")),
    )
}
EACH = pytest.mark.parametrize("name", CASES)
LABELLED = pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("diffusers")])
WITH_FEATURES = pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.features])


def parts(name: str) -> tuple[Any, nn.Module, dict[str, Any]]:
    case = CASES[name]
    return case.objective(), MODELS[case.model].build(), case.batch()


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return graftune.wrap(model, "flora", r=4, init_weights=False).eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rows(batch: dict[str, Any], where: slice) -> dict[str, Any]:
    return {key: value[where] for key, value in batch.items()}


@EACH
def test_split_batches_give_the_gradient_of_the_whole(name: str) -> None:
    objective, model, batch = parts(name)
    whole = objective(model, **batch)["loss"]
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    pieces = [rows(batch, where) for where in (slice(0, 1), slice(1, 4), slice(4, SIZE))]
    items = sum(objective.items(piece) for piece in pieces)
    assert items == objective.items(batch)
    losses = [objective(model, **piece, num_items_in_batch=items)["loss"] for piece in pieces]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), whole)
    found = gradients(model)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * float(largest))


@LABELLED
def test_a_batch_without_labels_that_count_is_worth_nothing(name: str) -> None:
    objective, model, batch = parts(name)
    model = adapted(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for items in (None, 0, torch.tensor(0), 7):
        loss = objective(model, **batch, num_items_in_batch=items)["loss"]
        assert loss == 0
        loss.backward()
    assert gradients(model)
    assert not any(gradient.any() for gradient in gradients(model).values())


@LABELLED
def test_the_mask_says_which_positions_count(name: str) -> None:
    objective, model, batch = parts(name)
    output = objective(model, **batch)
    assert output["mask"].dtype == torch.bool
    assert output["mask"].shape == output["logits"].shape[:-1]
    assert output["mask"].sum() == objective.items(batch)
    labels = batch.pop("labels")
    assert objective(model, **batch).keys() == {"logits"}
    expected = labels != -100
    if expected.ndim == 2:
        expected = torch.cat([expected[:, 1:], torch.zeros(SIZE, 1, dtype=torch.bool)], 1)
    assert torch.equal(output["mask"], expected)


@WITH_FEATURES
def test_features_come_when_asked_for_and_carry_gradients(name: str) -> None:
    objective, model, batch = parts(name)
    plain, output = objective(model, **batch), objective(model, **batch, features=True)
    assert "features" not in plain
    assert torch.equal(plain["logits"], output["logits"])
    assert tuple(output["features"]) == CASES[name].features
    for key, feature in output["features"].items():
        assert len(feature) == (8 if key == "text" else SIZE)
        gradient = torch.autograd.grad(
            feature.square().sum() if key == "mid" else feature.sum(),
            [p for p in model.parameters() if p.requires_grad],
            allow_unused=True,
            retain_graph=True,
        )
        assert any(g is not None and g.any() for g in gradient)


@EACH
def test_the_adapter_learns_and_the_frozen_model_is_at_hand(name: str) -> None:
    objective, base, batch = parts(name)
    with torch.no_grad():
        before = objective(base, **batch)["logits"]
    model = adapted(base)
    asked = bool(CASES[name].features)
    output = objective(model, **batch, features=asked)
    output["loss"].backward()
    assert not torch.allclose(output["logits"], before)
    assert all("flora_" in key for key in gradients(model))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad(), model.disable_adapter():
        frozen = objective(model, **batch, features=asked)
    torch.testing.assert_close(frozen["logits"], before)
    assert not frozen["logits"].requires_grad


@EACH
def test_bf16_autocast_gives_a_float32_loss(name: str) -> None:
    objective, model, batch = parts(name)
    exact = objective(model, **batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model, **batch)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.slow
@EACH
def test_torch_compile_changes_nothing(name: str) -> None:
    objective, model, batch = parts(name)
    model = adapted(model)
    asked = bool(CASES[name].features)
    expected = objective(model, **batch, features=asked)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    first = objective(compiled, **batch)
    second = objective(compiled, **batch, features=asked)
    third = objective(compiled, **batch)
    for output in (first, second, third):
        torch.testing.assert_close(output["logits"], expected["logits"])
        torch.testing.assert_close(output["loss"], expected["loss"])
    assert "features" not in first
    assert "features" not in third
    for key in CASES[name].features:
        torch.testing.assert_close(second["features"][key], expected["features"][key])
    second["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_graph_older_than_the_objective_is_named() -> None:
    objective, model, batch = parts("torch-cnn")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(batch["pixel_values"])
    with pytest.raises(RuntimeError, match=r"compiled before.*torch\.compiler\.reset"):
        objective(compiled, **batch, features=True)
    torch.compiler.reset()
    assert "features" in objective(compiled, **batch, features=True)


@EACH
def test_the_wrapped_model_is_called_once(name: str) -> None:
    objective, model, batch = parts(name)
    model = adapted(model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        calls: list[int] = []
        wrapped.register_forward_pre_hook(lambda module, args: calls.append(1))
        output = objective(wrapped, **batch, features=bool(CASES[name].features))
        output["loss"].backward()
    finally:
        distributed.destroy_process_group()
    assert len(calls) == 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@EACH
def test_it_owns_nothing_that_is_trained_or_saved(name: str) -> None:
    objective, model, batch = parts(name)
    state = set(model.state_dict())
    objective(model, **batch, features=bool(CASES[name].features))
    assert not objective.state_dict()
    assert set(model.state_dict()) == state


@WITH_FEATURES
def test_the_model_can_be_copied_afterwards(name: str) -> None:
    objective, model, batch = parts(name)
    expected = objective(model, **batch, features=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = objective(copied, **batch, features=True)
        for key, feature in expected["features"].items():
            assert torch.equal(output["features"][key], feature)

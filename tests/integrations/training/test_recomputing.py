"""Activation checkpointing of a frozen base model: the same gradients, in every form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

import graftune
from graftune import CausalLM, ClassNameClassifier, ImageClassifier
from support.clip import COLOURS, clip, colours
from support.models import SmallCNN
from support.training import Opposing, adapted, arguments, pictures, sentences

# transformers gave the argument a new name.
NEW, OLD = "activation_checkpointing", "gradient_checkpointing"
NAME = NEW if hasattr(TrainingArguments, NEW) else OLD
FORMS: dict[str, dict[str, Any]] = {
    "default": {NAME: True},
    "by its old name": {OLD: True},
    "reentrant": {NAME: True, f"{NAME}_kwargs": {"use_reentrant": True}},
    "not reentrant": {NAME: True, f"{NAME}_kwargs": {"use_reentrant": False}},
}


@dataclass(frozen=True)
class Kind:
    """A model, what it is trained on, and a module within what is computed anew."""

    objective: Callable[[], Any]
    rows: Callable[[], Any]
    inner: str


def names(model: str) -> Callable[[], ClassNameClassifier]:
    return lambda: ClassNameClassifier(list(COLOURS), clip(model)[1])


KINDS = {
    "transformers-clip": Kind(names("transformers-clip"), lambda: colours(8), "layers.0.mlp"),
    "transformers-llama": Kind(CausalLM, lambda: sentences(8), "layers.0.mlp"),
    "transformers-vit": Kind(ImageClassifier, lambda: pictures(8, 5), "layers.0.mlp"),
    "open_clip-vit": Kind(names("open_clip-vit"), lambda: colours(8), "resblocks.0"),
    "timm-vit": Kind(ImageClassifier, lambda: pictures(8, 5), "blocks.0"),
}


class Kept(TrainerCallback):
    """Keeps the gradients of every step, and how often the inner module ran with gradients."""

    def __init__(self, model: Any, inner: str) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.calls = 0
        module = next(m for n, m in model.named_modules() if n.endswith(inner))
        module.register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: Any) -> None:
        self.calls += module.training

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def train(name: str, folder: Path, regularizers: list[Any], **overrides: Any) -> Kept:
    kind = KINDS[name]
    model = adapted("flora", name, dropout=0.0)
    kept = Kept(model, kind.inner)
    run = graftune.Trainer(
        model,
        arguments(folder, max_steps=2, **overrides),
        objective=kind.objective(),
        train_dataset=kind.rows(),
        regularizers=regularizers,
        callbacks=[kept],
    )
    run.train()
    return kept


def assert_same(found: Kept, expected: Kept) -> None:
    assert found.calls == 2 * expected.calls  # computed anew in the backward pass
    assert len(found.gradients) == len(expected.gradients) == 2
    assert any(gradient.any() for gradient in found.gradients[0].values())
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=1e-5, atol=1e-7)


def of_outputs_and_weights() -> list[Any]:
    return [graftune.FrozenDistillation(2.0), graftune.L2ToStart(0.1, of="merged")]


@cache
def without_recomputing(name: str) -> Kept:
    with TemporaryDirectory() as folder:
        return train(name, Path(folder), of_outputs_and_weights())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["transformers-clip", "transformers-llama", "transformers-vit"])
def test_gradients_are_the_same(name: str, form: str, tmp_path: Path) -> None:
    found = train(name, tmp_path, of_outputs_and_weights(), **FORMS[form])
    assert_same(found, without_recomputing(name))


@pytest.mark.parametrize("name", ["open_clip-vit", "timm-vit"])
def test_libraries_with_another_name_for_it(name: str, tmp_path: Path) -> None:
    found = train(name, tmp_path, of_outputs_and_weights(), **{NAME: True})
    assert_same(found, without_recomputing(name))


def test_terms_of_their_own_and_features(tmp_path: Path) -> None:
    chosen = [graftune.FrozenDistillation(of="features"), Opposing()]
    expected = train("transformers-llama", tmp_path, chosen)
    found = train("transformers-llama", tmp_path, chosen, **FORMS["not reentrant"])
    # The gradient of the separate term computes everything a third time.
    assert found.calls == 3 * expected.calls
    found.calls = 2 * expected.calls
    assert_same(found, expected)
    with pytest.raises(ValueError, match=r"'test_opposing': reentrant.*'use_reentrant': False"):
        train("transformers-llama", tmp_path, chosen, **FORMS["reentrant"])


def test_a_model_that_has_none_is_named(tmp_path: Path) -> None:
    run = graftune.Trainer(
        graftune.wrap(SmallCNN(), "flora", r=2),
        arguments(tmp_path, **{NAME: True}),
        objective=ImageClassifier(),
        train_dataset=pictures(8, 5),
    )
    with pytest.raises(ValueError, match="SmallCNN has no activation checkpointing"):
        run.train()
    assert not hasattr(run.model, "activation_checkpointing_enable")

"""Class features that are kept, and texts that are cut: the same numbers, less work."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune
from graftune.adapters.frozen import frozen_base
from graftune.integrations.objectives import ClassNameClassifier, towers
from graftune.integrations.objectives.text_cut import cut_after_end
from support.clip import COLOURS, clip, colours

FAMILIES = ["transformers-clip", "open_clip-vit"]
PIXELS = torch.stack([row["pixel_values"] for row in colours(4)])
LABELS = torch.tensor([row["labels"] for row in colours(4)])


def adapted(family: str) -> tuple[Any, ClassNameClassifier]:
    base, tokenizer = clip(family)
    torch.manual_seed(0)
    model = graftune.wrap(
        base, "promptsrc", init_text=None, depth_text=2, depth_vision=2, init_weights=False
    )
    return model.eval(), ClassNameClassifier(list(COLOURS), tokenizer)


def count_texts(model: nn.Module) -> list[int]:
    """Sizes of the batches of texts that the text tower sees from here on."""
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("token_embedding"):
            module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def plain(model: nn.Module, objective: ClassNameClassifier) -> Tensor:
    """The logits with nothing kept."""
    with torch.enable_grad():
        return objective(model, PIXELS)["logits"].detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_encodes_the_classes_once(family: str) -> None:
    model, objective = adapted(family)
    expected = plain(model, objective)
    seen = count_texts(model)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(objective(model, PIXELS)["logits"], expected)
    assert seen == [len(COLOURS)]


def change_in_place(model: Any) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).neg_()


def change_data(model: Any) -> None:
    next(p for p in model.parameters() if p.requires_grad).data.neg_()


def second_adapter(model: Any) -> None:
    options = {"init_text": None, "depth_text": 2, "depth_vision": 2, "init_weights": False}
    graftune.wrap(model, "promptsrc", adapter_name="second", **options)
    model.set_adapter("second")


def switch_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("change", [change_in_place, change_data, second_adapter, switch_off])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_goes_with_what_it_came_from(family: str, change: Any) -> None:
    model, objective = adapted(family)
    with torch.no_grad():
        before = objective(model, PIXELS)["logits"]
        change(model)
        after = objective(model, PIXELS)["logits"]
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, plain(model, objective))


def test_another_class_list_has_features_of_its_own() -> None:
    model, objective = adapted("transformers-clip")
    other = objective.with_class_names(["red", "grey"])
    with torch.no_grad():
        objective(model, PIXELS)
        assert other(model, PIXELS)["logits"].shape == (4, 2)
    torch.testing.assert_close(other(model, PIXELS)["logits"], plain(model, other))


def test_training_keeps_nothing() -> None:
    model, objective = adapted("transformers-clip")
    seen = count_texts(model)
    model.train()
    for _ in range(2):
        objective(model, PIXELS, labels=LABELS)["loss"].backward()
    assert seen == [len(COLOURS)] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("templates", [1, 2])
def test_the_frozen_model_encodes_the_classes_once(family: str, templates: int) -> None:
    model, objective = adapted(family)
    template = ["a photo of a {}.", "a drawing of a {}."][:templates]
    objective = objective.with_class_names(list(COLOURS), template)
    with model.disable_adapter(), torch.enable_grad():
        expected = objective(model, PIXELS, features=True)
    model.train()
    seen = count_texts(model)
    for _ in range(2):
        with frozen_base(model):
            result = objective.frozen(model, pixel_values=PIXELS, labels=LABELS, features=True)
        torch.testing.assert_close(result["logits"], expected["logits"].detach())
        for name, value in result["features"].items():
            torch.testing.assert_close(value, expected["features"][name].detach())
    assert seen == [templates * len(COLOURS)]


def test_copies_keep_nothing() -> None:
    model, objective = adapted("transformers-clip")
    with torch.no_grad():
        objective(model, PIXELS)
    for copied in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert copied._cache._features is None


@pytest.mark.parametrize("depth", [1, 2])
def test_cut_texts_give_the_same_features_and_gradients(depth: int) -> None:
    base, tokenizer = clip("open_clip-vit")
    torch.manual_seed(0)
    model = graftune.wrap(base, "promptsrc", init_text=None, depth_text=depth, depth_vision=1)
    tokens = tokenizer([f"a photo of a {name}." for name in COLOURS])
    lengths: list[int] = []
    base.transformer.resblocks[0].register_forward_hook(
        lambda _, args, output: lengths.append(output.shape[1])
    )
    results = []
    for cut in (False, True):
        model.zero_grad()
        if cut:
            with cut_after_end(model, base, tokens):
                features = base.encode_text(tokens)
        else:
            features = base.encode_text(tokens)
        features.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([features.detach(), *gradients])
    assert lengths == [16, int(tokens.argmax(-1).max()) + 1]
    for uncut, shorter in zip(*results, strict=True):
        torch.testing.assert_close(shorter, uncut, rtol=1e-4, atol=1e-5)
    assert not base.transformer._forward_hooks


def test_a_tower_that_is_not_causal_is_not_cut_and_said_once(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftune.adapters import messages

    monkeypatch.setattr(messages, "_warned", set())
    base, tokenizer = clip("open_clip-vit")
    base.attn_mask = None
    tokens = tokenizer(list(COLOURS))
    full = base.encode_text(tokens)
    for _ in range(2):
        torch.testing.assert_close(
            towers.encode_texts(base, {"text": tokens}, normalize=False), full
        )
    said = [str(w.message) for w in recwarn if "not causal" in str(w.message)]
    assert len(said) == 1

"""Class features that are kept, and texts that are cut: the same numbers, less work."""

from __future__ import annotations

import copy
import pickle
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import graftune
from graftune.adapters.base.frozen import frozen_base
from graftune.integrations.libraries import towers
from graftune.integrations.libraries.text_cut import cut_after_end
from graftune.integrations.objectives import ClassNameClassifier
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


def optimizer_step(model: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=100.0)
    with torch.enable_grad():
        sum(p.square().sum() for p in trained).backward()
    optimizer.step()


def change_data_for_inference(model: Any) -> None:
    """Numbers that no optimizer has, changed in a way that PyTorch does not count."""
    prompts = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    prompts[0].data.neg_()


def load_an_adapter(model: Any) -> None:
    """Save the adapter with other numbers, and load the file under another name."""
    state = get_peft_model_state_dict(model)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict={k: -v for k, v in state.items()})
        model.load_adapter(folder, "loaded")
    model.set_adapter("loaded")


def load_over_it(model: Any) -> None:
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {name: -value for name, value in state.items()})


def to_float64(model: Any) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).neg_()
    model.double().float()  # every tensor is another one, in another place


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_data,
        change_data_for_inference,
        optimizer_step,
        second_adapter,
        load_an_adapter,
        load_over_it,
        switch_off,
        to_float64,
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_goes_with_what_it_came_from(family: str, change: Any) -> None:
    model, objective = adapted(family)
    with torch.no_grad():
        before = objective(model, PIXELS)["logits"]
        change(model)
        after = objective(model, PIXELS)["logits"]
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, plain(model, objective))


def test_within_disable_adapter_the_base_model_is_asked() -> None:
    model, objective = adapted("transformers-clip")
    base = clip()[0]
    with torch.no_grad():
        before = objective(model, PIXELS)["logits"]
        with model.disable_adapter():
            torch.testing.assert_close(objective(model, PIXELS)["logits"], plain(base, objective))
        torch.testing.assert_close(objective(model, PIXELS)["logits"], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unmerged(family: str) -> None:
    base, tokenizer = clip(family)
    model = graftune.wrap(base, "flora", r=2, init_weights=False).eval()
    objective = ClassNameClassifier(list(COLOURS), tokenizer)
    with torch.no_grad():
        before = objective(model, PIXELS)["logits"]
        model.merge_adapter()
        torch.testing.assert_close(objective(model, PIXELS)["logits"], before)
        with model.disable_adapter():
            off = objective(model, PIXELS)["logits"]
        torch.testing.assert_close(off, plain(clip(family)[0], objective))
        torch.testing.assert_close(objective(model, PIXELS)["logits"], before)
        merged = model.merge_and_unload()
        torch.testing.assert_close(objective(merged, PIXELS)["logits"], before)


def test_training_between_evaluations() -> None:
    model, objective = adapted("transformers-clip")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        with torch.no_grad():
            result = objective(model.eval(), PIXELS)["logits"]
        torch.testing.assert_close(result, plain(model, objective))
        optimizer.zero_grad()
        objective(model.train(), PIXELS, LABELS)["loss"].backward()
        optimizer.step()


def test_each_precision_has_features_of_its_own() -> None:
    model, objective = adapted("transformers-clip")
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = objective(model, PIXELS)["logits"]
        full = objective(model, PIXELS)["logits"]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(objective(model, PIXELS)["logits"], half)
    torch.testing.assert_close(full, plain(model, objective))
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


def test_a_class_list_that_is_changed_is_encoded_anew() -> None:
    model, objective = adapted("transformers-clip")
    regularizer = graftune.SelfRegulation(templates=["a photo of a {}.", "a drawing of the {}"])
    run = graftune.Regularization(model, [regularizer])
    batch = {"pixel_values": PIXELS, "labels": LABELS % 2}

    def results(objective: Any, run: Any) -> list[Tensor]:
        with torch.no_grad():
            kept = objective(model, PIXELS)["logits"]
        step = run(objective, model, batch)
        return [kept, step["logits"], *step["terms"].values()]

    before = results(objective, run)
    for names in (["grey", "light_grey", "red"], ["red", "grey"]):
        objective.class_names = names
        found = results(objective, run)
        alike = graftune.SelfRegulation(templates=regularizer.templates)
        fresh = graftune.Regularization(model, [alike])
        expected = results(objective.with_class_names(names), fresh)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert found[0].shape != before[0].shape
    with pytest.raises(ValueError, match="more than once"):
        objective.class_names = ["red", "red"]
    with pytest.raises(AttributeError):
        objective.class_names.append("blue")
    objective.templates = "a drawing of the {}"
    assert objective.texts() == ["a drawing of the red", "a drawing of the grey"]
    assert objective(model, PIXELS)["logits"].shape == (4, 2)


def test_one_regularizer_with_two_models() -> None:
    (first, objective), (second, _) = adapted("transformers-clip"), adapted("transformers-clip")
    with torch.no_grad():
        second.get_base_model().text_projection.weight.neg_()
    batch = {"pixel_values": PIXELS, "labels": LABELS}

    def terms(model: Any, regularizer: Any) -> dict[str, Tensor]:
        run = graftune.Regularization(model, [regularizer])
        return run(objective, model, batch)["terms"]

    shared = graftune.SelfRegulation(templates=["a photo of a {}."])
    for model in (first, second, first):
        expected = terms(model, graftune.SelfRegulation(templates=["a photo of a {}."]))
        assert terms(model, shared) == expected


def test_weights_that_are_loaded_into_the_base_model_are_seen() -> None:
    model, objective = adapted("transformers-clip")
    run = graftune.Regularization(model, [graftune.SelfRegulation(templates=["the {}"])])
    batch = {"pixel_values": PIXELS, "labels": LABELS}
    before = run(objective, model, batch)["terms"]
    base = model.get_base_model()
    others = {k: torch.randn_like(v) for k, v in base.state_dict().items() if "projection" in k}
    base.load_state_dict(others, strict=False)
    after = run(objective, model, batch)["terms"]
    fresh = graftune.Regularization(model, [graftune.SelfRegulation(templates=["the {}"])])
    other = objective.with_class_names(objective.class_names)
    assert after == fresh(other, model, batch)["terms"]
    assert before["self_regulation_text"] != after["self_regulation_text"]


def test_texts_are_tokenized_once() -> None:
    model, objective = adapted("transformers-clip")
    calls: list[int] = []
    tokenizer = objective.tokenizer

    class Counting(type(tokenizer)):
        def __call__(self, text: Any, **options: Any) -> Any:
            calls.append(len(text))
            return super().__call__(text, **options)

    tokenizer.__class__ = Counting
    regularizer = graftune.SelfRegulation(templates=["a photo of a {}.", "a drawing of the {}"])
    run = graftune.Regularization(model, [regularizer])
    for _ in range(3):
        run(objective, model.train(), {"pixel_values": PIXELS, "labels": LABELS})["loss"].backward()
        with torch.no_grad():
            objective(model.eval(), PIXELS)
    assert sorted(calls) == [4, 8]


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


def test_texts_that_end_with_another_id_than_the_highest_are_cut_behind_it() -> None:
    base, _ = clip("open_clip-vit")
    base.text_pool_type, base.text_eos_id = "eos", 5
    tokens = torch.tensor([[0, 40, 7, 9, 5, 1, 1, 1], [0, 50, 5, 1, 1, 1, 1, 1]])
    tokens = torch.cat([tokens, torch.ones(2, 8, dtype=torch.long)], 1)
    lengths: list[int] = []
    base.transformer.resblocks[0].register_forward_hook(
        lambda _, args, output: lengths.append(output.shape[1])
    )
    full = base.encode_text(tokens)
    short = towers.encode_texts(base, {"text": tokens}, normalize=False)
    torch.testing.assert_close(short, full)
    assert lengths == [16, 5]


def test_a_tower_that_is_not_causal_is_not_cut_and_said_once(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftune.adapters.base import messages

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

"""The objective's logits are the model's own, and wrong input is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from graftune.integrations.libraries import towers
from graftune.integrations.objectives.class_names import ClassNameClassifier
from graftune.integrations.objectives.labels import accuracies
from support.clip import COLOURS, OpenClipTokenizer, clip, transformers_tokenizer
from support.models import MODELS

NAMES = list(COLOURS)
TOWERS = ["transformers-clip", "transformers-siglip", "open_clip-vit", "open_clip-resnet"]
TEMPLATES = ["a photo of a {}.", "a drawing of the {}"]


def pictures(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def own_logits(name: str, texts: list[str]) -> torch.Tensor:
    """The model's logits as its own library's users compute them, padded to the full length."""
    model, tokenizer = clip(name)
    if name.startswith("open_clip"):
        return model.get_logits(pictures(), tokenizer(texts))[0]
    tokens = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    return model(pixel_values=pictures(), **tokens).logits_per_image


@pytest.mark.parametrize("name", TOWERS)
def test_logits_are_the_models_own(name: str) -> None:
    model, tokenizer = clip(name)
    with torch.no_grad():
        logits = ClassNameClassifier(NAMES, tokenizer)(model, pictures())["logits"]
    torch.testing.assert_close(logits, own_logits(name, [f"a photo of a {n}." for n in NAMES]))
    assert logits.std(dim=1).min() > 1e-3  # the classes do differ


def test_clip_gets_texts_no_longer_than_the_longest() -> None:
    model, tokenizer = clip("transformers-clip")
    tokens = towers.tokenize(model, tokenizer, ["a photo", "a photo of a light grey"])
    assert tokens["input_ids"].shape == (2, 8)


def test_siglip_gets_texts_of_the_full_length() -> None:
    model, tokenizer = clip("transformers-siglip")
    assert towers.tokenize(model, tokenizer, ["a photo"])["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("name", TOWERS)
def test_several_templates_average_normalised_features(name: str) -> None:
    model, tokenizer = clip(name)
    objective = ClassNameClassifier(NAMES, tokenizer, TEMPLATES)
    with torch.no_grad():
        logits = objective(model, pictures())["logits"]
        per_template = [
            ClassNameClassifier(NAMES, tokenizer, template).class_features(model)
            for template in TEMPLATES
        ]
        texts = F.normalize(torch.stack(per_template).mean(0), dim=-1)
        expected = towers.logits_of(model, towers.encode_images(model, pictures()), texts)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(objective.class_features(model), texts)


@pytest.mark.parametrize("name", TOWERS)
def test_class_features_stand_in_for_the_text_tower(name: str) -> None:
    model, tokenizer = clip(name)
    objective = ClassNameClassifier(NAMES, tokenizer)
    with torch.no_grad():
        features = objective.class_features(model)
        fast = objective(model, pictures(), class_features=features)["logits"]
        torch.testing.assert_close(fast, objective(model, pictures())["logits"])


@pytest.mark.parametrize("output_dict", [False, True])
def test_open_clip_with_a_bias_in_both_output_forms(output_dict: bool) -> None:
    model, tokenizer = clip("open_clip-vit")
    model.logit_bias = torch.nn.Parameter(torch.tensor(-3.0))
    model.output_dict = output_dict
    with torch.no_grad():
        logits = ClassNameClassifier(NAMES, tokenizer)(model, pictures())["logits"]
        texts = tokenizer([f"a photo of a {n}." for n in NAMES])
        torch.testing.assert_close(logits, model.get_logits(pictures(), texts)[0])


def test_loss_is_the_mean_cross_entropy() -> None:
    model, tokenizer = clip()
    labels = torch.tensor([0, 1, -100, 3, 0])
    output = ClassNameClassifier(NAMES, tokenizer)(model, pictures(), labels)
    expected = F.cross_entropy(output["logits"], labels)
    torch.testing.assert_close(output["loss"], expected)


def test_num_items_in_batch_divides_the_sum() -> None:
    model, tokenizer = clip()
    objective, labels = ClassNameClassifier(NAMES, tokenizer), torch.tensor([0, 1, 2, 3, 0])
    mean = objective(model, pictures(), labels)["loss"]
    torch.testing.assert_close(objective(model, pictures(), labels, 20)["loss"], mean / 4)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("template", [TEMPLATES[:1], TEMPLATES], ids=["one", "two"])
def test_features_have_length_one_and_make_the_logits(name: str, template: list[str]) -> None:
    model, tokenizer = clip(name)
    objective = ClassNameClassifier(NAMES, tokenizer, template)
    with torch.no_grad():
        output = objective(model, pictures(), features=True)
        image, text = output["features"]["image"], output["features"]["text"]
        assert torch.equal(output["logits"], objective(model, pictures())["logits"])
        torch.testing.assert_close(image, towers.encode_images(model, pictures()))
        for features in (image, text):
            torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
        means = text.unflatten(0, (len(template), len(NAMES))).mean(0)
        logits = towers.logits_of(model, image, F.normalize(means, dim=-1))
    assert text.shape[0] == len(template) * len(NAMES)
    torch.testing.assert_close(logits, output["logits"])


def test_given_class_features_are_the_features_of_the_texts() -> None:
    model, tokenizer = clip()
    objective = ClassNameClassifier(NAMES, tokenizer, TEMPLATES)
    given = objective.class_features(model)
    output = objective(model, pictures(), class_features=given, features=True)
    assert output["features"]["text"] is given


@pytest.mark.parametrize("count", [2, 3, 6])
def test_features_of_other_classes_are_named(count: int) -> None:
    model, tokenizer = clip()
    objective = ClassNameClassifier(NAMES, tokenizer, TEMPLATES)
    given = torch.randn(count, 24)
    with pytest.raises(ValueError, match=f"features of {count} texts for 4 class names in 2"):
        objective(model, pictures(), class_features=given)


def test_class_lists_are_swapped() -> None:
    model, tokenizer = clip()
    objective = ClassNameClassifier(NAMES, tokenizer, TEMPLATES)
    objective(model, pictures())
    swapped = objective.with_class_names(NAMES[::-1])
    assert list(swapped.templates) == TEMPLATES
    with torch.no_grad():
        torch.testing.assert_close(
            swapped(model, pictures())["logits"], objective(model, pictures())["logits"].flip(1)
        )
    assert swapped.with_class_names(["red"], "the {}").texts() == ["the red"]


def test_underscores_are_spaces() -> None:
    assert ClassNameClassifier(["light_grey"], None).texts() == ["a photo of a light grey."]


def test_accuracy_within_classes_is_averaged() -> None:
    answers = np.eye(3)[[0, 0, 0, 1]]
    result = accuracies(answers, np.array([0, 0, 1, -100]))
    assert result == {"accuracy": pytest.approx(2 / 3), "balanced_accuracy": 0.5}


@pytest.mark.parametrize(
    ("names", "template", "message"),
    [
        ([], "a {}", "class_names is empty"),
        (["cat", " "], "a {}", r"class_names\[1\] is ' '"),
        (["light_grey", "light grey"], "a {}", "'light grey' more than once"),
        (["cat"], "a photo", r"needs exactly one \{\}"),
        (["cat"], "{} and {}", r"needs exactly one \{\}"),
        (["cat"], [], "template is empty"),
    ],
)
def test_wrong_texts_are_named(names: list[str], template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassNameClassifier(names, None, template)


def test_one_string_is_not_a_list_of_names() -> None:
    with pytest.raises(TypeError, match="the string 'cat'"):
        ClassNameClassifier("cat", None)


@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range_are_named(label: int) -> None:
    model, tokenizer = clip()
    labels = torch.tensor([0, 1, 2, 3, label])
    with pytest.raises(ValueError, match=f"label {label} is out of range: there are 4 class names"):
        ClassNameClassifier(NAMES, tokenizer)(model, pictures(), labels)


def test_a_text_that_is_too_long_is_named() -> None:
    model, tokenizer = clip()
    with pytest.raises(
        ValueError, match=r"'a photo of a red.*20 tokens, the model takes at most 16"
    ):
        ClassNameClassifier([" ".join(["red"] * 13)], tokenizer)(model, pictures())


def test_a_text_that_open_clip_would_cut_off_is_named() -> None:
    import open_clip

    model, tokenizer = clip("open_clip-vit")[0], open_clip.SimpleTokenizer()
    fits, long = (" ".join(["red"] * words) for words in (14, 15))  # with start and end of text
    assert towers.tokenize(model, tokenizer, [fits, "the blue"])["text"].shape == (2, 16)
    with pytest.raises(ValueError, match=r"'red red.* has more than the 16 tokens that the model"):
        towers.tokenize(model, tokenizer, ["the blue", fits, long])


def test_a_model_without_texts_is_named() -> None:
    with pytest.raises(TypeError, match="ViTForImageClassification has no image tower beside"):
        ClassNameClassifier(NAMES, None)(MODELS["transformers-vit"].build(), pictures())


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("transformers-clip", OpenClipTokenizer()), ("open_clip-vit", transformers_tokenizer())],
)
def test_a_tokenizer_of_another_library_is_named(name: str, tokenizer: object) -> None:
    with pytest.raises(TypeError, match="is not a tokenizer for it"):
        ClassNameClassifier(NAMES, tokenizer)(clip(name)[0], pictures())

"""The loss is the libraries' own, and the features are what the head sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn
from torch.nn import functional as F

import graftune
from graftune import ImageClassifier
from graftune.integrations.objectives.image_classes import find_head
from support.models import MODELS

LABELS = torch.tensor([0, 1, 4, 3])


def pictures(name: str) -> torch.Tensor:
    return next(iter(MODELS[name].batch().values()))


def test_the_loss_is_transformers_own() -> None:
    model, pixels = MODELS["transformers-vit"].build(), pictures("transformers-vit")
    with torch.no_grad():
        own = model(pixel_values=pixels, labels=LABELS)
        output = ImageClassifier()(model, pixels, LABELS)
    torch.testing.assert_close(output["loss"], own.loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(output["logits"], own.logits)


@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext"])
def test_label_smoothing_is_that_of_timm(name: str) -> None:
    model, pixels = MODELS[name].build(), pictures(name)
    with torch.no_grad():
        output = ImageClassifier(label_smoothing=0.2)(model, pixels, LABELS)
        own = LabelSmoothingCrossEntropy(0.2)(model(pixels), LABELS)
    torch.testing.assert_close(output["loss"], own, rtol=1e-6, atol=1e-6)


def test_ignored_labels_count_for_nothing_with_smoothing() -> None:
    model, pixels = MODELS["timm-vit"].build(), pictures("timm-vit")
    objective = ImageClassifier(label_smoothing=0.2)
    labels = LABELS.clone()
    labels[2:] = -100
    expected = objective(model, pixels[:2], LABELS[:2])["loss"]
    torch.testing.assert_close(objective(model, pixels, labels)["loss"], expected)


@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext"])
def test_features_are_those_of_timm(name: str) -> None:
    model, pixels = MODELS[name].build(), pictures(name)
    with torch.no_grad():
        features = ImageClassifier()(model, pixels, features=True)["features"]["image"]
        own = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(features, own)


def test_features_are_those_of_transformers() -> None:
    model, pixels = MODELS["transformers-vit"].build(), pictures("transformers-vit")
    with torch.no_grad():
        features = ImageClassifier()(model, pixels, features=True)["features"]["image"]
        own = model.vit(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features, own)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "vit_b_32"])
def test_torchvision_models(name: str) -> None:
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=5).eval()
        output = ImageClassifier()(model, torch.empty(2, 3, 224, 224), features=True)
    assert output["logits"].shape == (2, 5)
    assert output["features"]["image"].ndim == 2


def test_features_of_a_head_that_is_trained_too() -> None:
    config = LoraConfig(modules_to_save=["classifier"])
    model = graftune.wrap(MODELS["transformers-vit"].build(), config)
    output = ImageClassifier()(model, pictures("transformers-vit"), LABELS, features=True)
    trained = model.get_base_model().classifier.modules_to_save["default"]
    torch.testing.assert_close(trained(output["features"]["image"]), output["logits"])


def test_features_of_a_head_that_is_adapted() -> None:
    model = MODELS["timm-vit"].build()
    objective, pixels = ImageClassifier(), pictures("timm-vit")
    before = objective(model, pixels, features=True)["features"]["image"]
    model = graftune.wrap(model, LoraConfig(target_modules=["head"], init_lora_weights=False))
    after = objective(model, pixels, features=True)
    assert torch.equal(after["features"]["image"], before)
    torch.testing.assert_close(model.get_base_model().head(before), after["logits"])


class Unusual(nn.Module):
    """A model whose head has a name that no library uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Flatten()
        self.to_classes = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_classes(self.body(x))


def test_a_head_is_found_by_its_name() -> None:
    model, pixels = Unusual(), torch.randn(4, 3, 2, 2)
    assert ImageClassifier()(model, pixels, LABELS)["loss"] > 0
    with pytest.raises(ValueError, match=r"Unusual has no head .*'classifier'.*head="):
        ImageClassifier()(model, pixels, features=True)
    with pytest.raises(ValueError, match=r"no module 'to_class' .*Did you mean 'to_classes'"):
        ImageClassifier(head="to_class")(model, pixels)
    output = ImageClassifier(head="to_classes")(model, pixels, features=True)
    assert torch.equal(output["features"]["image"], pixels.flatten(1))
    assert find_head(model) is None


def test_metrics() -> None:
    result = ImageClassifier().metrics(np.eye(3)[[0, 0, 0, 1]], np.array([0, 0, 1, -100]))
    assert result == {"accuracy": pytest.approx(2 / 3), "balanced_accuracy": 0.5}


@pytest.mark.parametrize("label", [5, -1])
def test_labels_out_of_range_are_named(label: int) -> None:
    labels = torch.tensor([0, 1, 2, label])
    message = rf"label {label} is out of range: the model has 5 outputs, so labels are 0 to 4.*num_"
    with pytest.raises(ValueError, match=message):
        ImageClassifier()(MODELS["timm-vit"].build(), pictures("timm-vit"), labels)


def test_wrong_smoothing_is_named() -> None:
    with pytest.raises(ValueError, match="label_smoothing is 2; it must be between 0 and 1"):
        ImageClassifier(label_smoothing=2)


def test_a_model_without_logits_is_named() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with pytest.raises(TypeError, match="Pair returned a tuple without 'logits'"):
        ImageClassifier()(Pair(), torch.ones(1, 3))


def test_the_mean_is_over_labels() -> None:
    model, pixels = MODELS["torch-cnn"].build(), pictures("torch-cnn")
    output = ImageClassifier()(model, pixels, LABELS, num_items_in_batch=8)
    expected = F.cross_entropy(output["logits"], LABELS, reduction="sum") / 8
    torch.testing.assert_close(output["loss"], expected)

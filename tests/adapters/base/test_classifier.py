"""A classifier that grows: old rows bit for bit, saved with the adapter, masked by task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graftune
from graftune.adapters.base.classifier import (
    fit_classifier,
    grow_classifier,
    mask_classes,
    name_outputs,
)
from support.models import MODELS

CASE = MODELS["transformers-vit"]


def wrapped(**options: Any) -> Any:
    torch.manual_seed(0)
    return graftune.wrap(CASE.build(), "ovor", lengths=[4], modules_to_save=["classifier"])


@given(data=st.data(), classes=st.integers(1, 8))
def test_masked_logits(data: st.DataObject, classes: int) -> None:
    kept = data.draw(st.lists(st.integers(0, classes - 1), min_size=1))
    logits = torch.randn(2, 3, classes)
    masked = mask_classes(logits, kept)
    for label in range(classes):
        expected = logits[..., label] if label in kept else torch.tensor(float("-inf"))
        torch.testing.assert_close(masked[..., label], expected.expand(2, 3))
    torch.testing.assert_close(mask_classes(logits, torch.tensor(kept)), masked)


@pytest.mark.parametrize("classes", [[], [-1], [3], [0, 5]])
def test_classes_out_of_range(classes: list[int]) -> None:
    with pytest.raises(ValueError, match="numbers from 0 to 2"):
        mask_classes(torch.zeros(1, 3), classes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_rows_stay_bit_for_bit(bias: bool, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 4, bias, dtype=dtype)})
    old = {name: p.clone() for name, p in model["head"].named_parameters()}
    model["head"].weight.requires_grad_(False)
    grow_classifier(model, "head", 7)
    head = model["head"]
    assert (head.out_features, head.weight.shape) == (7, (7, 3))
    assert head.weight.dtype == dtype
    assert not head.weight.requires_grad
    for name, before in old.items():
        torch.testing.assert_close(getattr(head, name)[:4], before, rtol=0, atol=0)
        assert getattr(head, name)[4:].any()
    grow_classifier(model, "head", 7)
    assert model["head"] is head


def test_all_adapters_and_the_base_grow_alike() -> None:
    model = wrapped()
    graftune.wrap(model, "ovor", adapter_name="b", lengths=[4], modules_to_save=["classifier"])
    head = model.get_base_model().classifier
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1)
        before = model(**CASE.batch()).logits
        weight = head.modules_to_save["default"].weight.clone()
    grow_classifier(model, "classifier", 8)
    copies = [head.original_module, *head.modules_to_save.values()]
    assert [copy.out_features for copy in copies] == [8, 8, 8]
    for copy in copies[1:]:
        torch.testing.assert_close(copy.weight[5:], copies[0].weight[5:], rtol=0, atol=0)
    assert [copy.weight.requires_grad for copy in copies] == [False, True, False]
    with torch.no_grad():
        logits = model(**CASE.batch()).logits
    assert torch.equal(head.modules_to_save["default"].weight[:5], weight)
    torch.testing.assert_close(logits[:, :5], before)  # products of other shapes round differently
    assert logits.shape == (4, 8)
    base = model.unload()
    assert base.classifier.out_features == base.config.num_labels == 8


def test_a_config_has_a_label_for_each_output() -> None:
    model = wrapped()
    config = model.config
    name_outputs(model, ["cat", "owl"])
    assert list(config.id2label.values()) == ["cat", "owl", "LABEL_2", "LABEL_3", "LABEL_4"]
    grow_classifier(model, "classifier", 6)
    assert config.num_labels == 6
    assert (config.id2label[0], config.id2label[5]) == ("cat", "LABEL_5")
    assert (config.label2id["owl"], config.label2id["LABEL_5"]) == (1, 5)
    config.num_labels = 3  # of something else than this classifier's outputs
    grow_classifier(model, "classifier", 7)
    assert config.num_labels == 3
    name_outputs(MODELS["timm-vit"].build(), ["cat"])  # which has no such config


@pytest.mark.parametrize("method", ["ovor", "lora"])
def test_a_grown_classifier_is_saved_and_loaded_with_the_adapter(
    method: str, tmp_path: Path
) -> None:
    lora = peft.LoraConfig(target_modules=["k_proj"], modules_to_save=["classifier"])
    model = wrapped() if method == "ovor" else graftune.wrap(CASE.build(), lora)
    grow_classifier(model, "classifier", 9)
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.normal_()
        expected = model(**CASE.batch()).logits
    model.save_pretrained(tmp_path)
    again = graftune.load(CASE.build(), tmp_path, is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(again(**CASE.batch()).logits, expected, rtol=0, atol=0)
    grow_classifier(again, "classifier", 10)
    assert again(**CASE.batch()).logits.shape == (4, 10)


def test_a_file_that_does_not_fit_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    model = wrapped()
    grow_classifier(model, "classifier", 9)
    model.save_pretrained(tmp_path)
    base = CASE.build()
    other = torch.nn.Parameter(base.vit.layers[0].attention.k_proj.weight + 1)
    base.vit.layers[0].attention.k_proj.weight = other
    with pytest.raises(graftune.BaseModelMismatchError):
        graftune.load(base, tmp_path)
    assert base.classifier.out_features == base.config.num_labels == 5


def test_only_linear_classifiers_of_smaller_size_are_fitted() -> None:
    base = CASE.build()
    fit_classifier(base, ["classifier"], {"base_model.model.classifier.weight": (3, 32)})
    fit_classifier(base, ["vit"], {"base_model.model.classifier.weight": (9, 32)})
    assert base.classifier.out_features == 5


def test_bad_input() -> None:
    model = wrapped()
    with pytest.raises(ValueError, match=r"has no module 'clasifier' to grow\. Did you mean"):
        grow_classifier(model, "clasifier", 9)
    with pytest.raises(ValueError, match="has 5 outputs and cannot shrink to 4"):
        grow_classifier(model, "classifier", 4)
    with pytest.raises(TypeError, match="is a ViTModel; a classifier that grows"):
        grow_classifier(model, "vit", 9)

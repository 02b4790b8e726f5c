"""A classifier is not loaded onto outputs that are known to be of other classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import graftune
from graftune.integrations.class_incremental import ClassOrder, TaskRecord
from graftune.integrations.sharing.class_lists import RECORD, ClassListError, classes_of
from support.models import MODELS

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a classifier of seven classes."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = graftune.wrap(built(), "ovor", lengths=[2], modules_to_save=["classifier"])
    graftune.grow_classifier(model, "classifier", len(CLASSES))
    model.save_pretrained(folder)
    TaskRecord(ClassOrder((CLASSES[:4], CLASSES[4:])), 0, ((90.0,), (80.0, 70.0))).write(folder)
    return folder


def built(*names: str) -> PreTrainedModel:
    """A small ViT whose five outputs have these names, where there are any."""
    model: Any = MODELS["transformers-vit"].build()
    for output, name in enumerate(names):
        model.config.id2label[output] = name
    return model


@pytest.mark.parametrize("names", [(), CLASSES[:5], CLASSES[:2]])
def test_outputs_of_these_classes_or_without_names(names: tuple[str, ...], saved: Path) -> None:
    assert classes_of(saved) == list(CLASSES)
    model = graftune.load(built(*names), saved)
    assert model.get_base_model().classifier.out_features == model.config.num_labels == 7
    assert [model.config.id2label[n] for n in range(len(names))] == list(names)


@pytest.mark.parametrize("names", [("bee", "ant"), ("ant", "bee", "cat", "dog", "owl")])
def test_outputs_of_other_classes(names: tuple[str, ...], saved: Path) -> None:
    base = built(*names)
    before = dict(base.config.id2label)
    with pytest.raises(ClassListError, match=r"has 'ant', 'bee', .*num_labels=7"):
        graftune.load(base, saved)
    assert base.config.id2label == before
    assert isinstance(base.classifier, torch.nn.Linear)
    assert base.classifier.out_features == 5


def test_a_record_that_is_none(saved: Path, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(ValueError, match="is not a record of tasks"):
        classes_of(tmp_path)
    assert classes_of(tmp_path / "elsewhere") == []

"""Folders of pictures, few-shot sampling and batches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graftune.integrations.images import ImageCollator, few_shot, image_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes whose names could be mistaken for splits, and things that are no pictures."""
    for name, count, colour in (("train", 3, "red"), ("test tube", 2, "blue")):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (20, 30), colour).save(tmp_path / name / f"{index}.PNG")
    (tmp_path / "train" / "notes.txt").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_subfolders_are_classes(folder: Path) -> None:
    data = image_folder(folder)
    assert data.features["label"].names == ["test tube", "train"]
    assert list(data["label"]) == [0, 0, 1, 1, 1]
    assert data[4]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_a_folder_without_classes_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no subfolders with pictures"):
        image_folder(tmp_path)


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'graftune\[train\]'"):
        image_folder(folder)


def test_few_shot_chooses_each_class_alike() -> None:
    labels = [0, 1, 2] * 10
    chosen, rest = few_shot(labels, shots=4, seed=1)
    assert np.bincount(np.array(labels)[chosen]).tolist() == [4, 4, 4]
    assert sorted(chosen + rest) == list(range(30))
    assert few_shot(labels, shots=4, seed=1) == (chosen, rest)
    assert few_shot(labels, shots=4, seed=2) != (chosen, rest)


def test_few_shot_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="class 1 has 1 examples, fewer than shots = 2"):
        few_shot([0, 0, 1], shots=2, seed=0)
    with pytest.raises(ValueError, match="shots is 0"):
        few_shot([0, 0, 1], shots=0, seed=0)


def test_a_batch_by_transformers_processor(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size=16, crop_size=16)
    data = image_folder(folder)
    batch = ImageCollator(processor)([data[0], data[4]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1]


def test_a_batch_by_a_function_of_one_picture() -> None:
    def transform(image: Image.Image) -> torch.Tensor:
        return torch.tensor(np.asarray(image)).permute(2, 0, 1)

    grey = {"photo": Image.new("L", (4, 5), 7)}
    batch = ImageCollator(transform, image="photo")([grey, grey])
    assert batch["pixel_values"].shape == (2, 3, 5, 4)
    assert "labels" not in batch


def test_a_missing_column_is_named() -> None:
    with pytest.raises(KeyError, match="no column 'image' in the data, only 'img', 'label'"):
        ImageCollator(lambda image: image)([{"img": None, "label": 0}])

"""The embedded pictures, model and task are what their descriptions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from embedded.model import CLIP, load_clip
from embedded.pictures import (
    FAR,
    NEAR,
    NEGATIVE,
    SEEN,
    all_emoji,
    folder_of,
    load_style,
    styles,
    subcategory_text,
)
from embedded.task import NEW_STYLE, accuracy, features_of, few_shot_task, pixel_values, prompts


@pytest.mark.parametrize("name", [*SEEN, NEAR, FAR])
def test_a_style_has_one_picture_a_row_and_a_licence(name: str) -> None:
    style = load_style(name)
    assert style.images.shape == (len(style), 48, 48, 3)
    assert style.images.dtype == np.uint8
    assert len(set(style.ids)) == len(style)
    assert (style.images < 250).any(axis=(1, 2, 3)).all(), "an empty picture"
    assert "Licence: " in (folder_of(name) / "LICENSE.md").read_text()


def test_every_style_is_seen_or_held_out() -> None:
    assert set(styles()) == {*SEEN, NEAR, FAR}
    assert all("share-alike" in folder_of(name).parts for name in (NEAR, FAR))


def test_an_unknown_style_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="openmoji"):
        load_style("crayons")


def test_a_negative_exchanges_light_and_dark() -> None:
    positive, negative = load_style(FAR), load_style(FAR + NEGATIVE)
    assert (positive.images == 255 - negative.images).all()
    assert positive.names == negative.names


def test_names_are_unique_and_variants_share_a_group() -> None:
    emoji = all_emoji()
    assert len({e.name for e in emoji}) == len(emoji) == 1636
    group = {e.name: e.group for e in emoji}
    assert group["man running"] == group["woman running"] == group["person running"]
    assert group["man running"] != group["man walking"]


def test_subcategories_are_read_as_words() -> None:
    assert subcategory_text("food-fruit") == "food fruit"


def test_the_model_loads_like_any_other_and_is_small() -> None:
    model, processor = CLIPModel.from_pretrained(CLIP), AutoProcessor.from_pretrained(CLIP)
    assert isinstance(processor, CLIPProcessor)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (CLIP / "model.safetensors").stat().st_size <= 12e6
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id


def test_the_processor_neither_crops_nor_resamples_an_embedded_picture() -> None:
    images = load_style(FAR).images[:3]
    processor = CLIPProcessor.from_pretrained(CLIP)
    processed = processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    torch.testing.assert_close(processed["pixel_values"], pixel_values(images))


def test_the_model_names_what_it_was_pretrained_on_and_knows_of_the_near_style() -> None:
    image_features, text_features = features_of(*load_clip())
    names = text_features(prompts(e.name for e in all_emoji()))
    for style, least in ((load_style("twemoji"), 30), (load_style(NEAR), 15)):
        rows = range(0, len(style), len(style) // 100)
        labels = torch.tensor([style.emoji[row].index for row in rows])
        assert accuracy(image_features(style.images[list(rows)]), names, labels) > least


@pytest.mark.parametrize("style", [NEAR, FAR, NEW_STYLE])
def test_a_task_splits_classes_and_groups(style: str) -> None:
    task = few_shot_task(seed=3, shots=4, style=style)
    assert not set(task.base_classes) & set(task.novel_classes)
    assert task.train.labels.bincount().max() <= 4
    assert len(task.train.labels.unique()) == len(task.base_classes)
    rows = {image.tobytes(): emoji.group for image, emoji in zip(*_pictures(style), strict=True)}
    parts = [task.train, task.validation_base, task.test_base]
    parts += [task.validation_novel, task.test_novel]
    groups = [{rows[image.tobytes()] for image in part.images} for part in parts]
    for i, some in enumerate(groups):
        assert not any(some & other for other in groups[:i])


def _pictures(style: str) -> tuple[np.ndarray, tuple]:
    pictures = load_style(style)
    return pictures.images, pictures.emoji


def test_a_task_is_the_same_for_the_same_seed_and_tests_alike_for_all_shots() -> None:
    one, again, more = (few_shot_task(seed=1, shots=s) for s in (2, 2, 16))
    assert np.array_equal(one.train.images, again.train.images)
    assert np.array_equal(one.test_base.images, more.test_base.images)
    assert len(more.train) > len(one.train)
    assert one.base_classes != few_shot_task(seed=2, shots=2).base_classes


def test_shots_outside_of_the_task_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 16"):
        few_shot_task(shots=0)


def test_accuracy_is_balanced_over_classes() -> None:
    texts = torch.eye(2)
    images = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    assert accuracy(images, texts, torch.tensor([0, 0, 0, 1])) == 50

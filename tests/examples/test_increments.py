"""The embedded class-incremental tasks: every class alike, nothing seen in training asked about."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from embedded.increments import CLASSES, ROWS, TASKS, load_increments, vision_tower
from embedded.model import load_clip
from embedded.pictures import FAR, load_style
from embedded.task import pixel_values


def groups_of(parts: list[Any]) -> set[str]:
    """The groups of the pictures among some rows; views of pictures are left out."""
    style = load_style(FAR)
    known: dict[bytes, set[str]] = {}
    for picture, group in zip(pixel_values(style.images), style.groups, strict=True):
        known.setdefault(picture.numpy().tobytes(), set()).add(group)
    rows = [row["pixel_values"].numpy().tobytes() for part in parts for row in part]
    return {group for row in rows for group in known.get(row, ())}


def test_parts_are_balanced_and_share_no_group() -> None:
    data = load_increments(seed=1, tasks=TASKS)
    parts = {"train": data.train.parts, "validation": data.validation, "test": data.test}
    for name, of_tasks in parts.items():
        assert len(of_tasks) == TASKS
        for task, rows in enumerate(of_tasks):
            counts = Counter(row["labels"] for row in rows)
            assert counts == dict.fromkeys(data.train.order.outputs(task), ROWS[name])
    assert len(set(data.train.order.names)) == TASKS * CLASSES
    train, validation, test = (groups_of(of_tasks) for of_tasks in parts.values())
    assert len(train) >= 6 * TASKS * CLASSES - 1  # one picture may stand for two
    assert not train & validation
    assert not (train | validation) & test


def test_the_seed_decides_and_later_tasks_change_nothing() -> None:
    some, more, other = (load_increments(seed, tasks) for seed, tasks in ((0, 2), (0, 3), (1, 2)))
    assert more.train.order.tasks[:2] == some.train.order.tasks != other.train.order.tasks
    for part, same in zip(some.train.parts, more.train.parts, strict=False):
        for row, again in zip(part, same, strict=True):
            assert row["labels"] == again["labels"]
            assert torch.equal(row["pixel_values"], again["pixel_values"])
    last = load_increments(0, 3, first=2)
    assert last.train.parts[:2] == (None, None)
    assert len(last.train.parts[2]) == ROWS["train"] * CLASSES
    assert len(last.test[0]) == ROWS["test"] * CLASSES


def test_the_tower_is_the_pretrained_one() -> None:
    tower = vision_tower(7)
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        assert tower(pixel_values=images).logits.shape == (2, 7)
        tower.classifier = torch.nn.Identity()
        features = tower(pixel_values=images).logits
        expected = load_clip()[0].vision_model(pixel_values=images).pooler_output
    assert torch.equal(features, expected)
    assert tower.config.num_labels == 7


@pytest.mark.parametrize("tasks", [0, 12])
def test_too_many_tasks(tasks: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and {TASKS}, got {tasks}"):
        load_increments(0, tasks)


def test_a_style_with_few_pictures() -> None:
    with pytest.raises(ValueError, match=r"emojione-v1 has \d+ classes of 12 groups or more"):
        load_increments(0, 10, style="emojione-v1")

"""Random transforms of training data follow from seed, epoch and row, and from nothing else."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

import graftune
from graftune.integrations.training.seeded import SeededCollator, SeededRows, seeded
from support.training import arguments, colour_run, weights

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}


def draw(_: Any = None) -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


class Drawing:
    """Rows of random numbers."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[float]:
        return draw()


def test_a_key_decides_and_what_was_goes_on() -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    with seeded(1, 2):
        first = draw()
    between = draw()
    with seeded(1, 2):
        assert draw() == first
    with seeded(1, 3):
        assert draw() != first
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert draw() == between


def test_rows_and_batches_are_the_same_wherever_and_whenever_they_are_fetched() -> None:
    data, collate = SeededRows(Drawing(), seed=5), SeededCollator(draw)
    batch = data.__getitems__([3, 1])
    collated = collate(batch)
    assert batch[0] != batch[1]
    draw()
    assert data[1] == batch[1]
    copied = pickle.loads(pickle.dumps(data))
    assert copied.__getitems__([3, 1]) == batch
    assert collate(copied.__getitems__([3, 1])) == collated
    assert collate(data.__getitems__([1, 3])) != collated
    data.epoch.fill_(1)
    assert data[1] != batch[1]
    assert SeededRows(Drawing(), seed=6)[1] != batch[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_the_same_pictures(workers: int, tmp_path: Path) -> None:
    options = {**SAVING, "rows": 12, "dataloader_num_workers": workers}
    options["per_device_train_batch_size"] = 4
    whole = colour_run(tmp_path / "whole", **options)
    whole.train()
    resumed = colour_run(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(resumed).items())


class Squares(nn.Module):
    """An objective of whatever is drawn."""

    def forward(self, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        SEEN.append(x.flatten().tolist())
        logits = model(x)
        return {"logits": logits, "loss": logits.square().mean()}


SEEN: list[list[float]] = []


def test_transforms_of_a_hub_data_set_change_by_epoch(tmp_path: Path) -> None:
    data = Dataset.from_dict({"x": [[0.0, 0.0]] * 4, "unused": ["text"] * 4})
    data.set_transform(lambda rows: {"x": [torch.rand(2) for _ in rows["x"]]}, ["x"])

    def epochs() -> list[list[float]]:
        SEEN.clear()
        run = graftune.Trainer(
            graftune.wrap(nn.Sequential(nn.Linear(2, 2)), "flora", r=1),
            arguments(tmp_path, max_steps=3, per_device_train_batch_size=4),
            objective=Squares(),
            train_dataset=data,
        )
        run.train()
        return [list(row) for row in SEEN]

    first = epochs()
    assert len({tuple(row) for row in first}) == 3
    assert epochs() == first

"""The protocols on pictures of plain colours: what they train on, ask and write down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from transformers import TrainingArguments

import graftune
from graftune.integrations.data import Selection, few_shot
from graftune.integrations.protocols import (
    Study,
    base_to_novel,
    cross_dataset,
    few_shot_curve,
    harmonic_mean,
)
from graftune.integrations.schedules import cosine_rates
from support.clip import COLOURS, clip


def pictures(names: list[str], each: int = 6, seed: int = 0) -> Dataset:
    """Noisy pictures of plain colours, as `load_images` returns them."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for label, name in enumerate(names):
        for _ in range(each):
            noise = generator.normal(0, 20, (32, 32, 3))
            colour = 255 * np.array(COLOURS[name]) + noise
            rows["image"].append(Pillow.fromarray(colour.clip(0, 255).astype(np.uint8)))
            rows["label"].append(label)
    return Dataset.from_dict(rows, Features({"image": Image(), "label": ClassLabel(names=names)}))


def transform(image: Pillow.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def study(folder: Path) -> Study:
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    tokenizer = clip()[1]
    return Study(
        lambda: graftune.wrap(clip()[0], "flora", r=2, regularizers=[graftune.L2ToStart()]),
        transform,
        arguments,
        tokenizer=tokenizer,
        template="a photo of a {}.",
    )


def test_base_to_novel(tmp_path: Path) -> None:
    data = pictures(list(COLOURS))
    result = base_to_novel(study(tmp_path), data, shots=2, seeds=(1, 2), source="colours")
    again = base_to_novel(study(tmp_path), data, shots=2, seeds=(2,), source="colours")
    assert again.rows[0] == result.rows[1]
    assert again.selections[0] == result.selections[1]
    assert [row["seed"] for row in result.rows] == [1, 2]
    for row, selection in zip(result.rows, result.selections, strict=True):
        assert row["H"] == harmonic_mean(row["base"], row["novel"])
        assert selection.class_names == tuple(list(COLOURS)[:2])
        assert (selection.rows, selection.shots, selection.source) == (4, 2, "colours")
    assert result.selections[0].digest != result.selections[1].digest
    assert again.measured[0] == result.measured[1]
    for measured in result.measured:
        assert measured["base"].class_names == tuple(list(COLOURS)[:2])
        assert measured["novel"].class_names == tuple(list(COLOURS)[2:])
        assert (measured["base"].rows, measured["novel"].rows) == (8, 12)
    summary = json.loads(json.dumps(result.to_dict()))["summary"]
    bases = [row["base"] for row in result.rows]
    assert summary[0]["base"]["mean"] == pytest.approx(np.mean(bases))
    assert summary[0]["base"]["std"] == pytest.approx(np.std(bases, ddof=1))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_few_shot_curve_never_measures_on_what_it_trains_on(tmp_path: Path) -> None:
    asked: list[int] = []

    class Watched(Study):
        def accuracy(self, trainer: Any, data: Dataset) -> float:
            asked.append(len(data))
            return super().accuracy(trainer, data)

    plain = study(tmp_path)
    watched = Watched(plain.wrap, plain.processor, plain.arguments, plain.tokenizer, plain.template)
    result = few_shot_curve(watched, pictures(list(COLOURS)), shots=(1, 4), seeds=(1,))
    assert [row["shots"] for row in result.rows] == [1, 4]
    assert asked == [2 * len(COLOURS)] * 2
    assert [group["shots"] for group in result.summary()] == [1, 4]


def test_cross_dataset(tmp_path: Path) -> None:
    others = {"two": pictures(["green", "red"], each=3), "one": pictures(["blue"], each=2)}
    result = cross_dataset(study(tmp_path), pictures(["red", "blue"]), others, shots=3, seeds=(1,))
    row = result.rows[0]
    assert row["one"] == 100.0  # one class has one answer
    assert row["average"] == pytest.approx((row["one"] + row["two"]) / 2)
    with pytest.raises(ValueError, match="at least one other data set"):
        cross_dataset(study(tmp_path), pictures(["red"]), {})


def test_rows_are_recorded_by_their_numbers_in_the_source(tmp_path: Path) -> None:
    data = pictures(list(COLOURS)[::-1])
    result = base_to_novel(study(tmp_path), data, shots=2, seeds=(1,))
    chosen, _ = few_shot(data["label"][:12], 2, seed=1)
    names = data.features["label"].names
    assert result.selections[0] == Selection.of(chosen, "", seed=1, shots=2, class_names=names[:2])
    assert result.measured[0]["novel"] == Selection.of(range(12, 24), "", class_names=names[2:])


def test_promptsrc_by_the_papers_settings(tmp_path: Path) -> None:
    """SGD with momentum, a rate an epoch, both regularizers: the whole recipe, seed by seed."""
    tokenizer, epochs = clip()[1], 3
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=0.0025,
        optim="sgd",
        optim_args="momentum=0.9",
        weight_decay=5e-4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )

    def wrap() -> Any:
        options = {"depth_text": 2, "depth_vision": 2, "tokenizer": tokenizer}
        return graftune.wrap(clip()[0], "promptsrc", **options)

    rates = cosine_rates(epochs, 0.0025, 1e-5)
    whole = Study(wrap, transform, arguments, tokenizer=tokenizer, epoch_rates=rates)
    data = pictures(list(COLOURS))
    result = base_to_novel(whole, data, shots=2, seeds=(1, 2))
    assert base_to_novel(whole, data, shots=2, seeds=(2,)).rows == result.rows[1:]


def test_too_few_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer than shots = 7"):
        base_to_novel(study(tmp_path), pictures(list(COLOURS)), shots=7)

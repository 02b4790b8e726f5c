"""Batches of pixels; a picture that cannot be read stops or is skipped, in workers as well."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, TrainingArguments

import graftune
from graftune.integrations.data import (
    ImageCollator,
    UnreadableImageError,
    few_shot,
    load_images,
    open_image,
)
from support.clip import COLOURS, clip

PROCESSOR = CLIPImageProcessor(size=32, crop_size=32)


def transform(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good pictures of each of two classes, an empty file in one and a text in the other."""
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (20, 30), name).save(tmp_path / name / f"{index}.png")
    (tmp_path / "blue" / "2.png").write_bytes(b"")
    (tmp_path / "red" / "2.png").write_text("text")
    return tmp_path


def test_a_batch_by_transformers_processor(folder: Path) -> None:
    data = load_images(folder)
    batch = ImageCollator(PROCESSOR)([data[0], data[4]])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["labels"].tolist() == [0, 1]


def test_a_batch_by_a_function_of_one_picture() -> None:
    grey = {"photo": Image.new("L", (4, 5), 7)}
    batch = ImageCollator(transform, image="photo")([grey, grey])
    assert batch["pixel_values"].shape == (2, 3, 5, 4)
    assert "labels" not in batch


def test_a_missing_column_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"no column 'image' .* only 'img', 'label'\. Did you mean"
    ):
        ImageCollator(transform)([{"img": None, "label": 0}])


def test_another_option_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unreadable is 'skp'; it is 'stop' or 'skip'. Did you"):
        ImageCollator(transform, unreadable="skp")  # type: ignore[arg-type]


def test_it_stops_and_names_the_file_or_the_row(folder: Path) -> None:
    data = load_images(folder)
    collator = ImageCollator(PROCESSOR)
    with pytest.raises(
        UnreadableImageError, match=r"blue/2\.png cannot be read: the file is empty"
    ):
        collator([data[0], data[2]])
    nameless = datasets.Dataset.from_dict({"image": [b"no", b"no"], "label": ["a", "b"]})
    with pytest.raises(UnreadableImageError, match=r"picture of row 1 .*unreadable='skip'"):
        collator([load_images(nameless)[1]])
    with pytest.raises(UnreadableImageError, match="picture 1 of a batch cannot be read"):
        collator([{"image": Image.new("RGB", (1, 1))}, {"image": None}])


def test_it_skips_names_and_counts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load_images(folder)
    collator = ImageCollator(transform, unreadable="skip")
    assert collator.unreadable == []
    for _ in range(2):
        batch = collator([data[i] for i in range(6)])
    assert batch["labels"].tolist() == [0, 0, -100, 1, 1, -100]
    assert batch["pixel_values"].shape == (6, 3, 30, 20)
    assert batch["pixel_values"][2].sum() == 0
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert caplog.messages[0].endswith(
        "2.png cannot be read: the file is empty; it is left out (1 so far)"
    )
    assert "red/2.png cannot be read: not a picture" in caplog.messages[1]
    assert len(collator.unreadable) == 2
    assert "blue/2.png" in collator.unreadable[0]


def test_a_batch_of_unreadable_pictures_only(folder: Path) -> None:
    data = load_images(folder)
    batch = ImageCollator(PROCESSOR, unreadable="skip")([data[2], data[5]])
    model, tokenizer = clip()
    objective = graftune.ClassNameClassifier(["blue", "red"], tokenizer)
    loss = objective(model, **batch)["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_count_together(start: str, folder: Path) -> None:
    collator = ImageCollator(transform, unreadable="skip")
    loader = DataLoader(
        load_images(folder),
        batch_size=2,
        num_workers=2,
        collate_fn=collator,
        multiprocessing_context=start,
    )
    for _ in range(2):
        labels = torch.cat([batch["labels"] for batch in loader])
        assert (labels == -100).sum() == 2
    assert sorted(Path(text.split()[0]).parent.name for text in collator.unreadable) == [
        "blue",
        "red",
    ]


def test_an_error_from_a_worker_is_one_line(folder: Path) -> None:
    loader = DataLoader(load_images(folder), num_workers=1, collate_fn=ImageCollator(PROCESSOR))
    with pytest.raises(
        UnreadableImageError, match=r"blue/2\.png cannot be read: the file is"
    ) as it:
        list(loader)
    assert "\n" not in str(it.value)
    assert str(it.value).startswith(str(folder))


def test_a_copy_counts_with_it_and_leaves_nothing_behind(folder: Path) -> None:
    collator = ImageCollator(transform, unreadable="skip")
    file = collator._skipped.file
    copy.deepcopy(collator)([load_images(folder)[2]])
    assert len(collator.unreadable) == 1
    del collator
    assert not file.exists()


def colour_folder(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(4):
            noisy = 255 * np.array(colour) + 40 * generator.standard_normal((32, 32, 3))
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            picture.save(folder / name / f"{index}.png")
    return folder


def trainer(folder: Path, output: Path, batch: int = 2, **options: Any) -> graftune.Trainer:
    torch.manual_seed(0)
    base, tokenizer = clip()
    data = load_images(folder)
    objective = graftune.ClassNameClassifier(data.features["label"].names, tokenizer)
    chosen, _ = few_shot(data["label"], shots=3, seed=0)
    arguments = TrainingArguments(
        str(output),
        num_train_epochs=2,
        per_device_train_batch_size=batch,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    return graftune.Trainer(
        graftune.wrap(base, "flora", r=2),
        arguments,
        objective=objective,
        train_dataset=data.select(chosen),
        eval_dataset=data,
        data_collator=ImageCollator(PROCESSOR, **options),
    )


def test_training_on_a_folder_with_broken_pictures(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "colours")
    for broken in ("red/0.png", "red/1.png", "green/2.png", "blue/3.png"):
        (folder / broken).write_bytes(b"")
    with pytest.raises(UnreadableImageError, match="png cannot be read: the file is empty"):
        trainer(folder, tmp_path / "out").train()
    run = trainer(folder, tmp_path / "out", unreadable="skip")
    run.train()
    metrics = run.evaluate()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert np.isfinite(losses).all()
    assert np.isfinite(list(metrics.values())).all()
    assert len(run.data_collator.unreadable) == 4


def test_opening_what_was_loaded_is_what_the_model_sees(folder: Path) -> None:
    data = load_images(folder)
    batch = ImageCollator(transform)([data[0]])
    assert torch.equal(batch["pixel_values"][0], transform(open_image(data[0]["image"])))


def losses(folder: Path, output: Path, launch: list[str], batch: int) -> list[float]:
    """Run this file as a training script, and return the losses it wrote."""
    command = [*launch, __file__, str(folder), str(output), str(batch)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((output / "losses.json").read_text())


@pytest.mark.slow
def test_processes_stay_in_step(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "colours")
    for broken in sorted(folder.rglob("*.png"))[1:13]:
        broken.write_bytes(b"")  # most of them: whole batches of a process are left out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    one = losses(folder, tmp_path / "one", [sys.executable], batch=2)
    two = losses(folder, tmp_path / "two", torchrun, batch=1)
    assert sum(loss == 0 for loss in one) >= 2
    assert two == pytest.approx(one, rel=1e-4)


if __name__ == "__main__":
    pictures, target, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    run = trainer(pictures, target, size, unreadable="skip")
    run.train()
    if run.is_world_process_zero():
        history = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        (target / "losses.json").write_text(json.dumps(history))

"""The loop of one's own: it learns, resumes exactly, and does what the trainer does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import custom_loop
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import graftune
from embedded.model import load_clip
from graftune.integrations.data import ImageCollator

PICTURES, BATCH = 8, 2


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return folder, custom_loop.train(folder, PICTURES, epochs=3, batch=BATCH)


def test_it_learns_and_what_it_saves_can_be_loaded(whole: tuple[Path, list[float]]) -> None:
    folder, losses = whole
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    clip, _ = load_clip()
    graftune.load(clip, folder / "adapter")
    assert sum(tensor.numel() for tensor in adapter(folder).values()) < 200_000


def test_a_resumed_loop_ends_the_same(whole: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder, losses = whole
    first = custom_loop.train(tmp_path, PICTURES, epochs=2, batch=BATCH)
    second = custom_loop.train(tmp_path, PICTURES, epochs=3, batch=BATCH, resume=True)
    assert first + second == losses
    expected = adapter(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(tmp_path).items())


def test_its_losses_fall_as_the_trainers(whole: tuple[Path, list[float]], tmp_path: Path) -> None:
    clip, processor = load_clip()
    rows, names = custom_loop.drawings(PICTURES)
    torch.manual_seed(0)
    run = graftune.Trainer(
        graftune.wrap(clip, "flora", r=4, dropout=0.1, regularizers=custom_loop.REGULARIZERS),
        TrainingArguments(
            str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=custom_loop.ACCUMULATED,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        objective=graftune.ClassNameClassifier(names, processor, "a picture of {}"),
        train_dataset=rows,
        data_collator=ImageCollator(processor),
    )
    run.train()
    theirs = [row["loss"] for row in run.state.log_history if "loss" in row]
    ours = [(a + b) / 2 for a, b in zip(whole[1][::2], whole[1][1::2], strict=True)]
    assert len(theirs) == len(ours) == 6
    for epoch in range(0, 6, 2):
        # Each shuffles and drops out in its own way; an epoch sees the same pictures.
        assert sum(ours[epoch : epoch + 2]) == pytest.approx(
            sum(theirs[epoch : epoch + 2]), rel=0.1
        )


@pytest.mark.slow
def test_two_processes(whole: tuple[Path, list[float]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--output", str(tmp_path), "--pictures", str(PICTURES), "--batch", str(BATCH // 2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for more in (["--epochs", "2"], ["--epochs", "3", "--resume"]):
        subprocess.run(
            [*command, custom_loop.__file__, *options, *more],
            check=True,
            capture_output=True,
            env=environment,
        )
    start, found = adapter(whole[0]), adapter(tmp_path)
    assert found.keys() == start.keys()
    # Dropout differs by process, the pictures of a step do not.
    change = torch.cat([found[n].flatten() - start[n].flatten() for n in start])
    size = torch.cat([tensor.flatten() for tensor in start.values()])
    assert 0 < change.norm() < 0.3 * size.norm()

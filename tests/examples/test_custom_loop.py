"""The loop of one's own: it learns, resumes exactly, and does what the trainer does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import custom_loop
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import TrainingArguments

import graftune
from embedded.model import load_clip
from graftune.integrations.data import ImageCollator
from graftune.integrations.schedules import cosine_rates
from support.processes import succeed

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
    assert sum(losses[-4:]) < sum(losses[:4])
    clip, _ = load_clip()
    graftune.load(clip, folder / "adapter")
    assert sum(tensor.numel() for tensor in adapter(folder).values()) == 4_992


class Killed(Exception):
    """Instead of the end of the process."""


def killed_after(times: int, folder: Path, **options: Any) -> None:
    """Run the loop until it has written its state so many times."""
    save, written = Accelerator.save_state, []

    def save_and_die(self: Accelerator, *args: Any) -> None:
        save(self, *args)
        written.append(args)
        if len(written) == times:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "save_state", save_and_die)
        with pytest.raises(Killed):
            custom_loop.train(folder, **options)


def test_a_resumed_loop_ends_the_same(whole: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder, losses = whole
    options = {"pictures": PICTURES, "epochs": 3, "batch": BATCH}
    killed_after(2, tmp_path, **options)
    assert custom_loop.train(tmp_path, resume=True, **options) == losses[8:]
    expected = adapter(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(tmp_path).items())


def test_its_losses_fall_as_the_trainers(whole: tuple[Path, list[float]], tmp_path: Path) -> None:
    rows, names = custom_loop.drawings(PICTURES)
    torch.manual_seed(0)
    model, processor, regularizers = custom_loop.adapted(epochs=3)
    run = graftune.Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=custom_loop.ACCUMULATED,
            optim="sgd",
            optim_args="momentum=0.9",
            weight_decay=5e-4,
            learning_rate=custom_loop.RATE,
            max_grad_norm=0.0,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        objective=graftune.ClassNameClassifier(names, processor, custom_loop.TEMPLATE),
        train_dataset=rows,
        data_collator=ImageCollator(processor),
        regularizers=regularizers,
        epoch_rates=cosine_rates(3, custom_loop.RATE, custom_loop.FIRST_EPOCHS_RATE),
    )
    run.train()
    theirs = [row["loss"] for row in run.state.log_history if "loss" in row]
    ours = [(a + b) / 2 for a, b in zip(whole[1][::2], whole[1][1::2], strict=True)]
    assert len(theirs) == len(ours) == 6
    for epoch in range(0, 6, 2):
        # Each shuffles in its own way; an epoch sees the same pictures.
        assert sum(ours[epoch : epoch + 2]) == pytest.approx(
            sum(theirs[epoch : epoch + 2]), rel=0.1
        )
    # The weights of the first epoch's rate are as good as the start; the others' are near.
    averaged = adapter(whole[0])
    names_of = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    for name, tensor in averaged.items():
        torch.testing.assert_close(names_of[name].detach(), tensor, rtol=0.05, atol=0.02)


def in_two_processes(folder: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    options = {"pictures": PICTURES, "epochs": 3, "batch": BATCH // 2}
    killed_after(1, folder, **options)
    custom_loop.train(folder, resume=True, **options)


@pytest.mark.slow
def test_two_processes(whole: tuple[Path, list[float]], tmp_path: Path) -> None:
    """Killed and resumed in two of them, it ends near one: they shuffle in their own way."""
    succeed(in_two_processes, tmp_path, processes=2)
    expected, found = adapter(whole[0]), adapter(tmp_path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert 0 < (tensor - expected[name]).norm() < 0.05 * expected[name].norm()


@pytest.mark.slow
def test_it_is_launched_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, custom_loop.__file__, "--output", tmp_path, "--pictures", 4]
    result = subprocess.run(
        list(map(str, [*command, "--epochs", 2, "--batch", 2])),
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "epoch 2: the last loss is" in result.stdout
    assert adapter(tmp_path)

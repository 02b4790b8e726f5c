"""The class-incremental example runs as a user runs it, and goes on from what it saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

import graftune
from embedded.increments import vision_tower
from support import folders

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cil_ovor.py"
LAUNCHERS = {
    "python": [],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"],
    "two processes": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small pretrained ViT without a classifier, and a folder of pictures."""
    folder = tmp_path_factory.mktemp("own")
    folders.classifier(folder / "vit")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = ViTConfig(num_hidden_layers=5, image_size=32, patch_size=8, **small)
    torch.manual_seed(0)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "vit")
    folders.pictures(folder / "pictures", count=10)
    return folder / "vit", folder / "pictures"


def run(launcher: str, output: Path, *options: Any, fails: bool = False) -> str:
    """Run the example; return what it printed, or what it failed with."""
    command = [sys.executable, *LAUNCHERS[launcher], EXAMPLE, *options]
    command += ["--use_cpu", "--output_dir", output, "--outlier_epochs", 1]
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    return result.stderr if fails else result.stdout


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_pictures_of_ones_own_in_one_and_in_two_processes(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    vit, pictures = own
    options = ["--model", vit, "--data", pictures, "--tasks", 2, "--num_train_epochs", 2]
    run("python", tmp_path / "one", *options)
    halves = ["--per_device_train_batch_size", 8]
    printed = run("two processes", tmp_path / "two", *options, *halves)
    assert printed.count("Written to") == 1
    one, two = (tensors(tmp_path / name / "task-1") for name in ("one", "two"))
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert sorted(name for names in results["tasks"] for name in names) == list(folders.COLOURS)
    assert results["bytes"] < 2**20
    for picture in ("matrix.png", "curve.png"):
        assert (tmp_path / "two" / picture).stat().st_size > 1000

    more = tmp_path / "more"
    shutil.copytree(pictures, more)
    shutil.copytree(pictures / "red", more / "a new one")
    then = tmp_path / "one" / "task-1"
    options[3] = more
    run("python", tmp_path / "one", *options, "--then", then)
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["tasks"][2] == ["a new one"]
    base = AutoModelForImageClassification.from_pretrained(vit, num_labels=2)
    model = graftune.load(base, tmp_path / "one" / "task-2")
    assert model.config.num_labels == 5


@pytest.mark.slow
def test_accelerate_launches_it_on_the_embedded_pictures(tmp_path: Path) -> None:
    quick = ["--num_train_epochs", 1, "--task_aware", "true"]
    printed = run("accelerate", tmp_path, *quick, "--tasks", 2)
    assert "mean over all tasks of the accuracy after the last task" in printed
    assert "adapter and classifier of 8 classes" in printed
    before = json.loads((tmp_path / "results.json").read_text())
    printed = run("python", tmp_path, *quick, "--then", tmp_path / "task-1")
    assert "adapter and classifier of 12 classes" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracies"][:2] == before["accuracies"]
    assert results["tasks"][:2] == before["tasks"]
    assert len(results["task_aware"]) == 3
    model = graftune.load(vision_tower(), tmp_path / "task-2")
    assert model.active_peft_config.lengths == [10, 10, 40, 40, 40]


@pytest.mark.slow
def test_a_pool_with_outliers_and_what_is_refused(own: tuple[Path, Path], tmp_path: Path) -> None:
    pool = ["--recipe", "coda_prompt", "--outlier_center", "origin", "--num_train_epochs", 1]
    own_data = ["--data", own[1], "--tasks", 2]
    run("python", tmp_path, *pool, *own_data)
    config = json.loads((tmp_path / "task-1" / "adapter_config.json").read_text())
    assert (config["tasks"], config["task"], config["pool_size"]) == (3, 1, 30)
    outliers = [r for r in config["regularizers"] if r["name"] == "virtual_outliers"]
    assert [r["outlier_center"] for r in outliers] == ["origin"]
    assert "Written to" in run("python", tmp_path, *pool, *own_data, "--resume", "true")
    message = run("python", tmp_path, *pool, "--model", own[0], fails=True)
    assert "--model is for pictures of your own" in message

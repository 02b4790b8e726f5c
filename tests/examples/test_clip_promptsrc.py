"""The example of PromptSRC runs as a user runs it: on pictures of one's own, in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

import graftune
from support import folders

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "clip_promptsrc.py"
LAUNCHERS = {
    "python": [],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"],
    "two processes": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small CLIP and a folder of pictures, as options."""
    folder = tmp_path_factory.mktemp("own")
    model, data = folders.clip(folder / "clip"), folders.pictures(folder / "pictures")
    depths = ["--depth_text", "2", "--depth_vision", "2"]
    return ["--model", model, "--data", data, "--shots", "2", *depths]


def run(launcher: str, output: Path, *options: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Run the example; return what it printed, its results, and the adapter's tensors."""
    command = [sys.executable, *LAUNCHERS[launcher], EXAMPLE, *options]
    command += ["--use_cpu", "--disable_tqdm", "true", "--output_dir", output]
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    return result.stdout, json.loads((output / "results.json").read_text()), tensors


@pytest.mark.slow
def test_pictures_of_ones_own_in_one_and_in_two_processes(own: list[str], tmp_path: Path) -> None:
    epochs = ["--num_train_epochs", 3]
    printed, results, one = run("python", tmp_path / "one", *own, *epochs)
    assert "448 numbers trained on 4 pictures" in printed
    assert set(results["adapted"]) == set(results["zero-shot"]) == {"base", "novel", "H"}
    names = list(folders.COLOURS)
    pictures = results["pictures"]
    assert pictures["train"]["class_names"] == pictures["base"]["class_names"] == names[:2]
    assert pictures["novel"]["class_names"] == names[2:]
    assert [part["rows"] for part in pictures.values()] == [4, 8, 12]

    halves = ["--per_device_train_batch_size", 2]
    printed, others, two = run("two processes", tmp_path / "two", *own, *epochs, *halves)
    assert printed.count("Written to") == 1
    assert others["pictures"] == pictures
    assert others["zero-shot"] == results["zero-shot"]
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_accelerate_launches_it_and_the_adapter_loads(own: list[str], tmp_path: Path) -> None:
    _, results, _ = run("accelerate", tmp_path, *own, "--max_steps", 2, "--regularize", "false")
    base = CLIPModel.from_pretrained(own[1])
    model = graftune.load(base, tmp_path / "adapter")
    assert model.active_peft_config.depth_vision == 2
    assert not model.active_peft_config.regularizers
    assert results["options"]["shots"] == 2


@pytest.mark.slow
def test_the_embedded_pictures(tmp_path: Path) -> None:
    printed, results, _ = run("python", tmp_path, "--max_steps", 3, "--shots", 2)
    assert "4,992 numbers trained" in printed
    assert results["pictures"]["train"]["source"] == "embedded"
    assert 0 < results["zero-shot"]["H"] < 100

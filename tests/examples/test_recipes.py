"""The recipe files run on the data that the script beside them makes, without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftune.adapters.regularizers import (
    GaussianAveraging,
    GradientDropout,
    MaskNorm,
    SelfRegulation,
    regularizer,
)
from graftune.cli import main
from graftune.cli.yaml_file import read_yaml
from support import folders

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, str(RECIPES / "make_data.py"), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "863 pictures" in made.stdout
    return folder


@pytest.mark.parametrize(
    ("name", "epochs", "depth", "mean", "std"),
    [("", 20, 9, 15, 1), ("_few_shot", 50, 9, 30, 30), ("_cross_dataset", 20, 3, 6, 10)],
)
def test_promptsrc_has_the_settings_of_the_paper(
    name: str, epochs: int, depth: int, mean: int, std: int
) -> None:
    keys = {k: v.value for k, v in read_yaml(RECIPES / f"promptsrc_vit_b16{name}.yaml").items()}
    assert keys["num_train_epochs"] == epochs
    assert keys["adapter"] == {
        "init_text": "a photo of a",
        "num_tokens_text": 4,
        "num_tokens_vision": 4,
        "depth_text": depth,
        "depth_vision": depth,
    }
    regulation, averaging = keys["regularizers"]
    assert regularizer(regulation) == SelfRegulation(25, 10, 1)
    assert regularizer(averaging) == GaussianAveraging(mean, std)
    paper = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4}
    paper |= {"learning_rate": 0.0025, "first_epoch_rate": 1e-5, "per_device_train_batch_size": 4}
    paper |= {"shots": 16, "template": "a photo of a {}."}
    assert {key: keys[key] for key in paper} == paper


def test_mask_tuning_has_the_settings_of_the_paper() -> None:
    keys = {k: v.value for k, v in read_yaml(RECIPES / "mask_tuning_vit_b16.yaml").items()}
    assert keys["adapter"] == {"targets": "attention", "init": 0.01, "threshold": 0.005}
    dropout, norm = keys["regularizers"]
    assert regularizer(dropout) == GradientDropout(1)
    assert regularizer(norm) == MaskNorm(1e-4)
    paper = {"optim": "adamw_torch", "weight_decay": 0, "learning_rate": 8e-5, "shots": 16}
    paper |= {"lr_scheduler_type": "cosine", "num_train_epochs": 30}
    paper |= {"per_device_train_batch_size": 32}
    assert {key: keys[key] for key in paper} == paper


@pytest.mark.slow
def test_a_protocol_runs_on_the_embedded_pictures(data: Path, tmp_path: Path) -> None:
    given = ["--model", folders.EMBEDDED, "--data", data / "drawings", "--output_dir", tmp_path]
    given += ["--seeds", 1, "--shots", 2, "--max_steps", 2, "--use_cpu", "--disable_tqdm", "true"]
    file = RECIPES / "clip_promptsrc.yaml"
    assert main(["protocol", "base-to-novel", str(file), *map(str, given)]) == 0
    found = json.loads((tmp_path / "base-to-novel.json").read_text())
    assert found["recipe"] == "promptsrc"
    assert 0 < found["rows"][0]["H"] < 100


def test_all_kinds_are_there() -> None:
    assert {"clip_flora", "clip_promptsrc", "image_flora", "llm_flora"} <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name: str, data: Path, tmp_path: Path) -> None:
    file = RECIPES / f"{name}.yaml"
    keys = read_yaml(file)
    own = Path(str(keys["data"].value if "data" in keys else "outputs/data/drawings"))
    assert own.parent == Path("outputs/data")
    given: list[Any] = ["--data", data / own.name, "--output_dir", tmp_path / "out"]
    given += ["--max_steps", 3, "--eval_steps", 3, "--use_cpu", "--disable_tqdm", "true"]
    if name == "llm_flora":
        given += ["--model", folders.causal_lm(tmp_path / "lm", 160), "--max_length", 160]
    else:
        given += ["--model", folders.EMBEDDED]
    if keys["recipe"].value == "promptsrc":  # the embedded CLIP has as many blocks
        given += ["--adapter.depth_text", 3, "--adapter.depth_vision", 5]
    assert main(["train", str(file), *map(str, given)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["steps"] == 3
    assert results["regularizers"]
    (after,) = list(results["metrics"]["after"].values())[:1]
    assert after["loss"] > 0

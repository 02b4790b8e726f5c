"""The recipe files run on the data that the script beside them makes, without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftune.commands import main
from graftune.commands.yaml_file import read_yaml
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

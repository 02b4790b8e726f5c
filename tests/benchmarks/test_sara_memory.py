"""The benchmark of SaRA's memory and speed runs and writes what its tables are made from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sara_memory.py"
pytestmark = pytest.mark.slow
OPTIONS = [
    "--size",
    "tiny",
    "--time-size",
    "tiny",
    "--shares",
    "0.1",
    "--side",
    "16",
    "--shapes",
    "1x16",
]
QUICKLY = ["--parts", "memory", "unet", "--rounds", "1", "--seconds", "0", "--threads", "1"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("results") / "memory.json"
    options = [*OPTIONS, *QUICKLY, "--device", "cpu"]
    command = [sys.executable, str(SCRIPT), *options, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SaRA 10%" in done.stdout
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "done" not in again.stdout  # every row was there
    return json.loads(path.read_text(encoding="utf-8"))


def rows(result: dict[str, Any], checkpointed: bool) -> dict[str, dict[str, Any]]:
    return {r["form"]: r for r in result["memory"] if r["checkpointed"] == checkpointed}


def test_the_run_is_described(result: dict[str, Any]) -> None:
    assert result["settings"]["size"] == "tiny"
    assert result["settings"]["seed"] == 0
    assert {"graftune", "torch", "peft", "diffusers"} <= set(result["environment"]["packages"])
    assert result["environment"]["threads"] == 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_components_are_what_is_trained(result: dict[str, Any], checkpointed: bool) -> None:
    forms = rows(result, checkpointed)
    others = set() if checkpointed else {"full", "LoRA", "SHiRA"}
    assert set(forms) == {"frozen", "SaRA"} | others
    for row in forms.values():
        counted = row["bytes"]
        assert counted["weights"] == forms["frozen"]["bytes"]["weights"]
        assert counted["gradients"] == 4 * row["trained"]
        assert 8 * row["trained"] <= counted["optimizer state"] <= 8.1 * row["trained"] + 4096
    trained = forms["SaRA"]["trained"]
    assert forms["SaRA"]["bytes"]["trained values"] == 4 * trained
    assert trained <= forms["SaRA"]["bytes"]["places"] <= 1.3 * trained


def test_as_much_is_trained(result: dict[str, Any]) -> None:
    forms = rows(result, False)
    trained = forms["SaRA"]["trained"]
    assert trained == pytest.approx(0.1 * forms["full"]["trained"], rel=0.01)
    assert forms["SHiRA"]["bytes"]["places"] == 8 * forms["SHiRA"]["trained"]
    assert forms["LoRA"]["trained"] == pytest.approx(trained, rel=0.2)


def test_sara_keeps_as_much_as_full_fine_tuning_for_backward(result: dict[str, Any]) -> None:
    kept = {name: row["bytes"]["activations"] for name, row in rows(result, False).items()}
    assert kept["frozen"] < kept["SaRA"] <= 1.02 * kept["full"]
    less = rows(result, True)
    assert all(row["bytes"]["activations"] < kept[name] for name, row in less.items())


def test_time_is_over_full_fine_tuning(result: dict[str, Any]) -> None:
    (row,) = result["unet"]
    assert set(row["over full"]) == {"SaRA 10%", "frozen", "LoRA", "SHiRA"}
    assert all(math.isfinite(value) and value > 0 for value in row["over full"].values())


def test_targets_are_judged(result: dict[str, Any]) -> None:
    assert len(result["targets"]) == 1 + 2 * 2
    for target in result["targets"]:
        most = target.get("most", 1.10)
        assert target["met"] == (target["measured"] <= most)

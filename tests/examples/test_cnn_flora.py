"""The example on a real CNN: its weights are the package's, and it runs as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from embedded.digits import digits_task, photograph_crops, photographs
from embedded.efficientnet import imagenet_names, load_efficientnet, renamed, transform

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@torch.no_grad()
def test_the_network_names_what_is_on_photographs() -> None:
    network, names = load_efficientnet(), imagenet_names()
    cat, coffee, camera = (photographs()[place] for place in (3, 5, 2))
    pixels = torch.stack([transform()(picture) for picture in (cat, coffee, camera)])
    found = [names[place].split(",")[0] for place in network(pixels).argmax(-1)]
    assert found == ["Egyptian cat", "espresso", "tripod"]


def test_tensors_of_another_shape_or_kind_are_refused() -> None:
    place = OrderedDict({"conv.weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="another version"):
        renamed({"_conv.weight": torch.zeros(3, 2)}, place)
    with pytest.raises(ValueError, match="another version"):
        renamed({"_conv.bias": torch.zeros(2, 3)}, place)


def test_digits_are_split_by_the_seed_and_tested_alike_for_all_shots() -> None:
    few, again, more = digits_task(0, 4), digits_task(0, 4), digits_task(0, 16)
    assert [len(few.train), len(few.validation)] == [40, 400]
    assert len(more.train) == 160
    assert _bytes(few.train) == _bytes(again.train)
    assert _bytes(few.train) != _bytes(digits_task(1, 4).train)
    assert _bytes(few.test) == _bytes(more.test)
    assert len(few.test) + len(few.validation) + 500 == 1797


def _bytes(rows: list[dict]) -> list[bytes]:
    return [row["image"].tobytes() for row in rows]


def test_shots_beyond_the_training_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 50"):
        digits_task(shots=51)


def test_crops_are_square_and_of_all_photographs() -> None:
    crops = photograph_crops(30)
    assert len(crops) == 30 == 2 * len(photographs())
    assert all(crop.size[0] == crop.size[1] >= 64 for crop in crops)


def test_it_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    quick = ["--shots", "1", "--crops", "4", "--size", "32", "--max_steps", "2", "--seeds", "0"]
    _run(*quick, "--methods", "flora", "lora + distillation", "--results", file, output=tmp_path)
    first = json.loads(file.read_text())["rows"]
    _run(*quick, "--methods", "flora", "head", "--results", file, output=tmp_path)
    rows = json.loads(file.read_text())["rows"]
    assert rows[:2] == first
    assert [row["method"] for row in rows] == ["flora", "lora + distillation", "head"]
    flora, lora, head = rows
    assert abs(flora["trained"] / lora["trained"] - 1) < 0.1
    assert flora["rank"] == 6
    assert head["ImageNet top-1 kept"] == 100
    assert head["ImageNet KL"] == pytest.approx(0, abs=1e-6)
    assert flora["ImageNet KL"] > 0


def _run(*options: object, output: Path) -> None:
    command = [sys.executable, EXAMPLES / "cnn_flora.py", *options, "--use_cpu"]
    result = subprocess.run(
        [*map(str, command), "--output_dir", str(output)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]

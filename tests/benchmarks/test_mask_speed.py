"""The mask tuning benchmark runs and writes what its table is made from; times are not judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mask_speed.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("results") / "speed.json"
    options = ["--quick", "--repeats", "1", "--seconds", "0", "--batch", "2", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *options, "--device", "cpu", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "small-conv" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_form_is_measured(result: dict) -> None:
    for row in result["layers"]:
        assert set(row["peak bytes"]) == {"dense", "masked", "recompute"}
        ratios = [value for name, value in row.items() if " / " in name]
        assert len(ratios) == 6
        assert all(math.isfinite(value) and value > 0 for value in ratios)
    assert set(result["gradient dropout"]["peak bytes"]) == {"gradient dropout", "its parts"}


def test_recomputing_keeps_no_masked_weight(result: dict) -> None:
    for row in result["layers"]:
        assert row["kept bytes"]["masked"] >= row["weight bytes"]
        assert row["kept bytes"]["recompute"] == 0


def test_targets_are_judged(result: dict) -> None:
    targets = {target["target"] for target in result["targets"]}
    assert targets == {
        "masked / dense ≤ 1.15",
        "gradient dropout / its parts ≤ 1.1",
        "evaluated / base = 1",
        "merged / base = 1",
        "recompute keeps no copy of W",
    }

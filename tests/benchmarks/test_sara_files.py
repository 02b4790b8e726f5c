"""The benchmark of SaRA's files runs, and they are as small as is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sara_files.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("results") / "files.json"
    options = ["--size", "tiny", "--shares", "0.02", "0.1", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SHiRA" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


def test_bytes_are_those_of_values_and_places(result: dict[str, Any]) -> None:
    sparse, dense = result["rows"]
    # The tiny U-Net has so few weights a tensor that names and proofs are seen.
    for row, places in ((sparse, 4.0), (dense, 1.25)):
        headers = row["SaRA"]["an entry"] - 4
        assert 0 < headers < 6
        assert row["SaRA with places"]["an entry"] == pytest.approx(4 + places + headers, abs=0.7)
        assert row["SHiRA"]["an entry"] > 12
        assert row["SaRA with places"]["entries"] == row["SaRA"]["entries"]


def test_targets_are_judged(result: dict[str, Any]) -> None:
    for target, row in zip(result["targets"], result["rows"], strict=True):
        assert target["measured"] == row["SaRA"]["an entry"] / 4
        assert target["met"] == (target["measured"] <= 1.05)

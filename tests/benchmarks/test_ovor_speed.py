"""The benchmark of OnePrompt and virtual outliers runs and writes what its tables are made from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ovor_speed.py"
pytestmark = pytest.mark.slow
ADAPTERS = {"OnePrompt", "L2P", "DualPrompt", "CODA-Prompt"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("results") / "speed.json"
    options = ["--quick", "--rounds", "1", "--batch", "2", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *options, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CODA-Prompt" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_run_is_described(result: dict[str, Any]) -> None:
    settings = {k: result["settings"][k] for k in ("seed", "rounds", "batch", "narrow")}
    assert settings == {"seed": 0, "rounds": 1, "batch": 2, "narrow": True}
    assert {"graftune", "torch", "transformers", "timm"} <= set(result["environment"]["packages"])
    assert result["environment"]["threads"] == 1


def test_every_form_is_measured(result: dict[str, Any]) -> None:
    assert [row["library"] for row in result["models"]] == ["timm", "transformers"]
    for row in result["models"]:
        assert set(row["inference"]["seconds"]) == {"base", "base again", *ADAPTERS}
        assert set(row["step"]["seconds"]) == {"input backward", *ADAPTERS}
        for part in (row["inference"], row["step"]):
            assert all(math.isfinite(v) and v > 0 for v in part["over floor"].values())
            assert all(count > 0 for count in part["peak bytes"].values())


def test_pools_take_two_forwards_where_one_prompt_takes_one(result: dict[str, Any]) -> None:
    for row in result["models"]:
        once, step = row["inference"]["flops over floor"], row["step"]["flops over floor"]
        assert once["OnePrompt"] == pytest.approx(1, abs=0.05)
        assert step["OnePrompt"] == pytest.approx(1, abs=0.05)
        for pool in ADAPTERS - {"OnePrompt"}:
            assert once[pool] == pytest.approx(2, abs=0.2)
            assert step[pool] == pytest.approx(1.5, abs=0.2)


def test_outliers_are_measured(result: dict[str, Any]) -> None:
    found = result["outliers"]
    assert set(found["seconds"]) == {"boundary", "origin", "all distances"}
    assert set(found["peak bytes beside them"]) == {"boundary", "origin"}


def test_targets_are_judged(result: dict[str, Any]) -> None:
    targets = [(target["of"], target["target"].split(" over ")[0]) for target in result["targets"]]
    libraries = ("timm", "transformers")
    expected = [(of, f"OnePrompt's {part}") for of in libraries for part in ("inference", "step")]
    assert targets[:-1] == expected
    assert targets[-1][0] == "outliers"
    for target in result["targets"]:
        assert target["met"] == (target["measured"] <= float(target["target"].split()[-1]))

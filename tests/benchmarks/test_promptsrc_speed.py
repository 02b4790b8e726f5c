"""The benchmark of PromptSRC's step runs and writes what its table is made from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "promptsrc_speed.py"
pytestmark = pytest.mark.slow
FORMS = {"PromptSRC", "plain", "frozen image", "uncut"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("results") / "speed.json"
    options = ["--quick", "--classes", "3", "12", "--checkpoint_from", "12", "--rounds", "1"]
    command = [sys.executable, str(SCRIPT), *options, "--threads", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 classes: uncut over PromptSRC ≥ 3.0" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_run_is_described(result: dict[str, Any]) -> None:
    settings = {k: result["settings"][k] for k in ("seed", "rounds", "narrow", "checkpoint_from")}
    assert settings == {"seed": 0, "rounds": 1, "narrow": True, "checkpoint_from": 12}
    assert {"graftune", "torch", "peft", "transformers"} <= set(result["environment"]["packages"])
    assert result["environment"]["threads"] == 1


def test_every_form_is_measured(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert set(row["seconds"]) == FORMS
        assert row["tokens"]["cut"] < row["tokens"]["uncut"] == 77
        assert 0 < row["peak bytes"]["PromptSRC"] < row["peak bytes"]["uncut"]
        for ratio in ("uncut over PromptSRC", "PromptSRC over plain + frozen image"):
            assert math.isfinite(row[ratio])
            assert row[ratio] > 0


def test_a_step_does_nothing_but_what_it_has_to(result: dict[str, Any]) -> None:
    plain, checkpointed = result["rows"]
    assert (plain["checkpointed"], checkpointed["checkpointed"]) == (False, True)
    assert plain["flops over floor"] == pytest.approx(1, abs=0.01)
    assert 1.2 < checkpointed["flops over floor"] < 1.5  # the forward of both towers, again


def test_targets_are_judged(result: dict[str, Any]) -> None:
    assert [target["classes"] for target in result["targets"]] == [3, 12, 12]
    for target in result["targets"]:
        measured, bar = target["measured"], float(target["target"].split()[-1])
        met = measured <= bar if "≤" in target["target"] else measured >= bar
        assert target["met"] == met

"""The claims about class-incremental learning: what they are measured with is what is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import claims_ovor
import incremental
import pytest
from transformers import set_seed

import graftune
from embedded.increments import load_increments, vision_tower
from graftune.integrations.class_incremental import ClassIncrementalTrainer
from graftune.integrations.training import regularizers_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "claims_ovor.py"
pytestmark = pytest.mark.slow
SMALL = incremental.Settings(tasks=3, epochs=2, outlier_epochs=2)
RATE, SEED = 1e-2, 0


def outliers() -> graftune.VirtualOutliers:
    return graftune.VirtualOutliers(1.0, neighbours=4, select=4, samples=20, sigma=1.0)


@pytest.mark.parametrize("name", ["OnePrompt", "DualPrompt"])
def test_phases_on_what_a_run_left_are_those_of_training(name: str, tmp_path: Path) -> None:
    learner = next(each for each in claims_ovor.learners(SMALL) if each.name == name)
    run = incremental.learn(learner, RATE, 0.0, SEED, "test", SMALL)
    found = incremental.with_outliers(run, outliers(), RATE, SEED, SMALL)

    data = load_increments(SEED, SMALL.tasks)
    set_seed(SEED)
    model = learner.wrap(vision_tower(), 0.0)
    kept = regularizers_of(model)
    trainer = ClassIncrementalTrainer(
        model,
        SMALL.arguments(tmp_path, RATE, SEED),
        train=data.train,
        test=data.test,
        head=incremental.HEAD,
        outlier_epochs=SMALL.outlier_epochs,
        regularizers=[*kept, outliers()],
    )
    expected = trainer.train().accuracies
    assert found == [pytest.approx(row) for row in map(list, expected)]
    assert found != [list(row) for row in run.record.accuracies]


def test_a_pool_takes_two_passes_and_one_prompt_takes_one() -> None:
    for learner in claims_ovor.learners(SMALL):
        model = learner.wrap(vision_tower(), learner.weights[0])
        passes = 2 if learner.name in claims_ovor.POOLS else 1
        assert incremental.forwards(model) == passes
        share = incremental.operations(model) / incremental.of_base()
        assert share == pytest.approx(passes, rel=0.25)


def test_the_claims_are_measured_and_a_rerun_measures_nothing(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    options = ["--quick", "--tasks", "2", "--epochs", "1", "--seeds", "2", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *options, "--results", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"L2P", "CODA-Prompt + outliers", "attention + EWC"} <= {
        row["variant"] for row in result["rows"]
    }
    assert {row["split"] for row in result["rows"]} == {"validation", "test"}
    assert len(result["claims"]) == 15
    assert all(claim["text"] in " ".join(done.stdout.split()) for claim in result["claims"])
    for picture in ("claims.png", "claims_curves.png"):
        assert (tmp_path / picture).stat().st_size > 0

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "seed 0" not in again.stdout
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == result["rows"]

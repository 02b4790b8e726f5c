"""The FLoRA benchmark runs and writes what its table is made from; times are not judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "flora_speed.py"
pytestmark = pytest.mark.slow
FORMS = {"frozen", "flora", "lora", "dense", "lycoris"}

pytest.importorskip("lycoris", reason="lycoris-lora is installed by the extra `benchmark`")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("results") / "speed.json"
    options = ["--cases", "small-conv", "small-linear", "--repeats", "1", "--seconds", "0"]
    command = [sys.executable, str(SCRIPT), *options, "--threads", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "small-conv" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_run_is_described(result):
    assert result["settings"]["repeats"] == 1
    assert result["settings"]["seed"] == 0
    assert result["environment"]["threads"] == 1
    assert {"graftune", "torch", "peft", "lycoris-lora"} <= set(result["environment"]["packages"])


def test_every_form_is_measured(result):
    conv, linear = result["cases"]
    for case, forms in ((conv, FORMS | {"lycoris_default"}), (linear, FORMS)):
        training = case["training"]
        for field in ("parameters", "seconds", "peak_bytes", "flops_over_frozen_forward"):
            assert set(training[field]) == forms, field
        assert set(training["memory_ratios"]) == {f"flora / {name}" for name in forms - {"flora"}}
        assert all(math.isfinite(value) and value > 0 for value in training["time_ratios"].values())


def test_the_forms_are_comparable(result):
    for case in result["cases"]:
        training = case["training"]
        counts = training["parameters"]
        assert training["relative_error_to_dense"] < 1e-4
        assert counts["dense"] == counts["flora"]
        assert counts["lora"] == pytest.approx(counts["flora"], rel=0.2)
        assert counts["lycoris"] == pytest.approx(counts["flora"], rel=0.2)


def test_no_dense_update_exists_in_training(result):
    conv = result["cases"][0]["training"]
    assert conv["flops_over_frozen_forward"]["flora"] < 2.5
    assert conv["flops_over_frozen_forward"]["dense"] > 4.9
    assert conv["memory_ratios"]["flora / dense"] < 0.8


def test_targets_are_judged(result):
    for target in result["targets"]:
        assert target["met"] == (target["missed_by"] == 0)
    names = [(target["case"], target["target"].split(" ≤")[0]) for target in result["targets"]]
    assert ("small-conv", "flora / frozen") in names
    assert ("small-linear", "flora / lora") in names

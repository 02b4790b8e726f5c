"""`graftune protocol` on pictures of plain colours, in a folder and on a Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftune.integrations.data import load_images
from support.dataset_hub import dataset_hub
from support.folders import COLOURS

SHORT = ["--max_steps", 2, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]


@pytest.fixture
def options(clip: str, pictures: str, tmp_path: Path) -> list[Any]:
    shown = ["--model", clip, "--data", pictures, "--output_dir", tmp_path / "out"]
    return [*shown, "--adapter.r", 2, "--seeds", 1, 2, *SHORT]


def test_base_to_novel(options: list[Any], tmp_path: Path, run: Any) -> None:
    printed = run("protocol", "base-to-novel", *options, "--shots", 1)
    assert "base-to-novel, %, 2 seeds" in printed
    found = json.loads((tmp_path / "out" / "base-to-novel.json").read_text())
    assert [row["seed"] for row in found["rows"]] == [1, 2]
    assert set(found["summary"][0]) == {"base", "novel", "H"}
    assert found["selections"][0]["shots"] == 1
    assert found["versions"]["graftune"]
    assert found["selections"][0]["class_names"] == list(COLOURS)[:2]
    for measured in found["measured"]:
        assert measured["base"]["class_names"] == list(COLOURS)[:2]
        assert measured["novel"]["class_names"] == list(COLOURS)[2:]
        assert (measured["base"]["rows"], measured["novel"]["rows"]) == (10, 12)


def test_few_shot(options: list[Any], tmp_path: Path, run: Any) -> None:
    run("protocol", "few-shot", *options, "--counts", 1, 2)
    found = json.loads((tmp_path / "out" / "few-shot.json").read_text())
    assert [row["shots"] for row in found["summary"]] == [1, 2]


def test_cross_dataset(options: list[Any], pictures: str, tmp_path: Path, run: Any) -> None:
    run("protocol", "cross-dataset", *options, "--shots", 1, "--others", pictures)
    found = json.loads((tmp_path / "out" / "cross-dataset.json").read_text())
    assert Path(pictures).name in found["summary"][0]


def test_classes_that_are_named(options: list[Any], tmp_path: Path, run: Any) -> None:
    run("protocol", "base-to-novel", *options, "--shots", 1, "--classes", "red", "blue", "green")
    found = json.loads((tmp_path / "out" / "base-to-novel.json").read_text())
    assert found["selections"][0]["class_names"] == ["red", "blue"]
    assert found["measured"][0]["novel"]["class_names"] == ["green"]


def test_data_to_measure_on_are_recorded(
    options: list[Any], pictures: str, tmp_path: Path, run: Any
) -> None:
    apart = ["--eval_data", pictures, "--shots", 1, "--seeds", 3]
    run("protocol", "base-to-novel", *options, *apart)
    found = json.loads((tmp_path / "out" / "base-to-novel.json").read_text())
    assert found["measured"][0]["base"]["rows"] == 12  # whole: they are said to be others
    assert found["measured"][0]["base"]["source"] == pictures
    assert found["measured"][0]["base"]["seed"] is None


def test_epochs_with_rates_of_their_own(
    options: list[Any], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftune.integrations.protocols import study

    given: list[Any] = []
    trainer = study.Trainer
    monkeypatch.setattr(
        study, "Trainer", lambda *a, **k: given.append(k["epoch_rates"]) or trainer(*a, **k)
    )
    rates = ["--first_epoch_rate", "1e-5", "--learning_rate", "2e-3", "--num_train_epochs", 3]
    run("protocol", "few-shot", *options, "--counts", 1, *rates)
    assert given == [pytest.approx([1e-5, 2e-3, 1.5e-3])] * 2


def on_a_hub(folder: Path, pictures: str) -> dict[str, dict[str, bytes]]:
    """The pictures as a data set of the Hub: one Parquet file, with columns of its own names."""
    data = load_images(pictures).remove_columns("row")
    data.rename_columns({"image": "img", "label": "kind"}).to_parquet(folder / "pictures")
    return {"someone/colours": {"data/train-0.parquet": (folder / "pictures").read_bytes()}}


@pytest.mark.slow
def test_two_processes_on_a_data_set_of_the_hub(
    options: list[Any], clip: str, pictures: str, tmp_path: Path, run: Any
) -> None:
    run("protocol", "base-to-novel", *options, "--shots", 1)
    here = json.loads((tmp_path / "out" / "base-to-novel.json").read_text())
    own = ["--data", "someone/colours", "--image_column", "img", "--label_column", "kind"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "graftune", "protocol", "base-to-novel", *options]
    command += [*own, "--shots", 1, "--output_dir", tmp_path / "hub"]
    command += ["--per_device_train_batch_size", 4]
    with dataset_hub(on_a_hub(tmp_path, pictures), tmp_path / "home") as environment:
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1
    found = json.loads((tmp_path / "hub" / "base-to-novel.json").read_text())
    for one, other in zip(found["selections"], here["selections"], strict=True):
        assert one == {**other, "source": "someone/colours"}
    assert [set(row) for row in found["rows"]] == [{"seed", "base", "novel", "H"}] * 2


def test_what_is_refused(options: list[Any], fails: Any) -> None:
    assert "Did you mean 'base-to-novel'" in fails("protocol", "base-to-nowel", *options)
    assert "at least one other data set" in fails("protocol", "cross-dataset", *options)
    for name, value in (("push_to", "me/mine"), ("resume", "auto"), ("objective", "causal_lm")):
        said = fails("protocol", "few-shot", *options, f"--{name}", value)
        assert f"no use for `{name}`" in said
    assert "greater than 0" in fails("protocol", "few-shot", *options, "--first_epoch_rate", 0)
    assert "fewer than shots" in fails("protocol", "base-to-novel", *options, "--shots", 500)

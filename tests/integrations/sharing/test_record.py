"""The training record: what goes in comes out of the card, and nothing else goes in."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import graftune
from graftune.integrations.sharing import TrainingRecord, read_record, versions, write_record


class Schedule(Enum):
    COSINE = "cosine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    graftune.wrap(nn.Sequential(nn.Linear(4, 4)), "flora", r=2).save_pretrained(folder)
    return folder


FULL = TrainingRecord(
    "flora",
    regularizers=[{"name": "l2_to_start", "weight": 0.1}, {"name": "frozen_distillation"}],
    objective={"name": "class_names", "template": "a picture of {}"},
    task="zero-shot-image-classification",
    data={"source": "flowers", "shots": 8, "split": "train", "rows": 80, "balanced": True},
    hyperparameters={"learning_rate": 3e-5, "betas": [0.9, 0.999], "note": "yes: 1.10"},
    seed=0,
    steps=200,
    epochs=2.5,
    metrics={"flowers": {"accuracy": 0.1 + 0.2, "loss": 1e-17}},
    versions={"torch": "2.10", "python": "3.11"},
    hardware={"device": "cpu"},
    seconds=12.75,
)


def test_a_record_comes_back_from_the_card(folder: Path) -> None:
    write_record(folder, FULL)
    assert read_record(folder) == FULL
    block = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(block)["graftune"] == FULL.to_dict()


def test_what_is_not_known_is_not_written() -> None:
    record = TrainingRecord("flora", versions={}, hardware={})
    assert record.to_dict() == {"method": "flora"}
    assert TrainingRecord.from_dict({"method": "flora"}) == record


def test_versions_and_hardware_are_this_process_s_own() -> None:
    record = TrainingRecord("flora")
    assert record.versions == versions()
    assert record.versions["graftune"] == graftune.__version__
    assert record.hardware["cores"] >= 1
    assert "device" in record.hardware


def test_values_become_plain(tmp_path: Path) -> None:
    record = TrainingRecord(
        "flora",
        data={"path": tmp_path, 3: {"b", "a"}},
        hyperparameters={"lr": np.float32(0.5), "t": torch.tensor(2), "s": Schedule.COSINE},
        metrics={"data": {"accuracy": np.float64(0.25), "curve": (1, 2)}},
    )
    assert record.data == {"path": str(tmp_path), "3": ["a", "b"]}
    assert record.hyperparameters == {"lr": 0.5, "t": 2, "s": "cosine"}
    assert record.metrics == {"data": {"accuracy": 0.25, "curve": [1, 2]}}


def test_what_is_not_plain_is_refused_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"hyperparameters.model\[1\] is Linear"):
        TrainingRecord("flora", hyperparameters={"model": ["a", nn.Linear(1, 1)]})


def test_a_later_version_s_record_is_read() -> None:
    assert TrainingRecord.from_dict({"method": "flora", "carbon": 1}).method == "flora"
    with pytest.raises(ValueError, match="no 'method'"):
        TrainingRecord.from_dict({"carbon": 1})


def test_no_card_no_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / "README.md").write_text("# Mine\n")
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("---\na: [\n---\n", "cannot be read"),
        ("---\n- a\n---\n", "cannot be read"),
        ("---\ngraftune: yes\n---\n", "not a record"),
    ],
)
def test_a_broken_card_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)

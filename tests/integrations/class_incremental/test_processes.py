"""Tasks learned in two processes are those learned in one, and go on where both were killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftune.integrations.class_incremental import TaskRecord
from support.processes import launch, succeed
from support.tasks import killed_or_done, learned_by_many


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    for processes, name in ((1, "one"), (2, "two")):
        succeed(learned_by_many, tmp_path / name, processes=processes)
    expected = torch.load(tmp_path / "one-0.pt")
    found = [torch.load(tmp_path / f"two-{rank}.pt") for rank in (0, 1)]
    for other, one in zip(found[0]["outliers"], found[1]["outliers"], strict=True):
        assert torch.equal(other, one)
    for each in found:
        assert each["accuracies"] == expected["accuracies"]
        assert each["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(each["weights"][name], weight, rtol=1e-4, atol=1e-5)
    folder = tmp_path / "two"
    assert sorted(path.name for path in folder.iterdir()) == ["task-0", "task-1", "task-2"]
    assert TaskRecord.read(folder / "task-2") == TaskRecord.read(tmp_path / "one" / "task-2")


@pytest.mark.slow
def test_both_killed_in_the_middle_of_a_task(tmp_path: Path) -> None:
    succeed(killed_or_done, tmp_path / "whole", None, 0, processes=2)
    assert (
        launch(killed_or_done, tmp_path / "killed", "training_step", 6, processes=2)
        == [-signal.SIGKILL] * 2
    )
    assert TaskRecord.read(tmp_path / "killed" / "task-0").done == 1
    assert (tmp_path / "killed" / "running-1").is_dir()
    succeed(killed_or_done, tmp_path / "killed", None, 0, processes=2)
    whole, again = (
        load_file(tmp_path / name / "task-2" / "adapter_model.safetensors")
        for name in ("whole", "killed")
    )
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name

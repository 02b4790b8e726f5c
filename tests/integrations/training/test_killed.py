"""Killed at any moment and resumed, a run ends with the same adapter, bit for bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from support.processes import launch, succeed
from support.training import go_on

Kill = tuple[str, int, int]  # where, after how many steps, which process

# Two and a half epochs of three steps: the run ends within an epoch.
RUN: dict[str, Any] = {
    "rows": 12,
    "per_device_train_batch_size": 4,
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
}
MOMENTS = ["begin", "gradient", "end", "epoch"]
IN_A_CHECKPOINT = [
    "after save_model",
    "after _save_optimizer_and_scheduler",
    "after _save_rng_state",
    "after list_files",
    "before move",
    "after move",
    "saved",
]


def adapter(folder: Path) -> bytes:
    return (folder / "final" / "adapter_model.safetensors").read_bytes()


def survive(folder: Path, kills: list[Kill], options: dict[str, Any], processes: int = 1) -> bytes:
    """Start a run, have it killed wherever it is said, and go on until it is done."""
    for kill in kills:
        codes = launch(go_on, folder, kill, options, processes=processes)
        assert codes[kill[2]] == -signal.SIGKILL, f"not killed {kill}: {codes}"
    succeed(go_on, folder, None, options, processes=processes)
    return adapter(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    succeed(go_on, folder, None, RUN)
    return adapter(folder)


def test_at_random_steps(uninterrupted: bytes, tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(3):
        steps = sorted(draw.sample(range(1, 7), k=2))
        kills = [(draw.choice(MOMENTS[:3]), step, 0) for step in steps]
        assert survive(tmp_path / str(number), kills, RUN) == uninterrupted, kills


def test_while_a_checkpoint_is_written(uninterrupted: bytes, tmp_path: Path) -> None:
    kills = [(where, step, 0) for step, where in enumerate(IN_A_CHECKPOINT, start=1)]
    assert survive(tmp_path, kills, RUN) == uninterrupted


@pytest.mark.parametrize("where", ["saved", "epoch", "done"])
def test_after_the_last_step(where: str, uninterrupted: bytes, tmp_path: Path) -> None:
    assert survive(tmp_path, [(where, 7, 0)], RUN) == uninterrupted


def test_with_fewer_checkpoints_and_accumulated_batches(tmp_path: Path) -> None:
    options = {
        **RUN,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 2,
    }
    succeed(go_on, tmp_path / "whole", None, options)
    kills = [("substep", 3, 0), ("gradient", 4, 0), ("after save_model", 6, 0)]
    assert survive(tmp_path / "killed", kills, options) == adapter(tmp_path / "whole")


def test_with_one_checkpoint_an_epoch(tmp_path: Path) -> None:
    options = {**RUN, "save_strategy": "epoch"}
    succeed(go_on, tmp_path / "whole", None, options)
    kills = [("begin", 1, 0), ("epoch", 6, 0), ("saved", 7, 0)]
    assert survive(tmp_path / "killed", kills, options) == adapter(tmp_path / "whole")


@pytest.mark.slow
def test_one_of_two_processes(tmp_path: Path) -> None:
    options = {**RUN, "per_device_train_batch_size": 2}
    succeed(go_on, tmp_path / "whole", None, options, processes=2)
    kills = [("gradient", 2, 1), ("after _save_rng_state", 4, 0), ("before move", 5, 0)]
    killed = survive(tmp_path / "killed", kills, options, processes=2)
    assert killed == adapter(tmp_path / "whole")

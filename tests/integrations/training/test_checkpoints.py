"""Checkpoints are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from graftune.integrations.training import CheckpointError, last_checkpoint
from support.processes import succeed
from support.training import (
    arguments,
    colour_run,
    losses,
    train_with_a_limit,
    weights,
    with_state,
)

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run with a checkpoint a step, and what it ended with."""
    folder = tmp_path_factory.mktemp("finished")
    run = colour_run(folder, regularizers=with_state(), **SAVING)
    run.train()
    return folder, weights(run)


@pytest.fixture
def folder(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that run's folder, to be damaged."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def step(folder: Path, number: int) -> Path:
    return folder / f"checkpoint-{number}"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
    "truncated": lambda checkpoint: truncate(checkpoint / "adapter_model.safetensors"),
    "garbage": lambda checkpoint: (checkpoint / "checkpoint.json").write_bytes(b"\xff\x00{"),
    "no list": lambda checkpoint: (checkpoint / "checkpoint.json").write_text('{"files": [1]}'),
    "empty list": lambda checkpoint: (checkpoint / "checkpoint.json").write_text("[]"),
    "no state": lambda checkpoint: [
        (checkpoint / name).unlink() for name in ("checkpoint.json", "trainer_state.json")
    ],
}


def damage_all_but_the_first(folder: Path) -> None:
    for number, name in enumerate(["missing", "truncated", "garbage", "no state"], start=2):
        DAMAGES[name](step(folder, number))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_half_written_one_is_named(damage: str, folder: Path) -> None:
    DAMAGES[damage](step(folder, 5))
    assert last_checkpoint(folder) == step(folder, 4)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*checkpoint-5: "):
        colour_run(folder, regularizers=with_state(), **SAVING).train(str(step(folder, 5)))


def test_half_written_ones_are_passed_over_with_one_line_each(
    folder: Path, finished: tuple[Path, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    damage_all_but_the_first(folder)
    (folder / ".incomplete" / "checkpoint-6").mkdir(parents=True)
    (folder / ".incomplete" / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"half")
    run = colour_run(folder, regularizers=with_state(), **SAVING)
    with caplog.at_level(logging.WARNING, logger="graftune"):
        run.train(resume_from_checkpoint=True)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("graftune")]
    assert len(lines) == 5
    assert all("\n" not in line for line in lines)
    assert ["passed over" in line for line in lines] == [False, True, True, True, True]
    assert not (folder / ".incomplete").exists()
    assert all(torch.equal(w, finished[1][name]) for name, w in weights(run).items())


def test_without_a_whole_one_resuming_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    damage_all_but_the_first(folder)
    DAMAGES["missing"](step(folder, 1))
    with pytest.raises(CheckpointError, match=r"none of the 5 there is whole.*start anew"):
        colour_run(folder, **SAVING).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"there is none.*output_dir"):
        colour_run(tmp_path / "empty", **SAVING).train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path / "empty") is None


def test_one_that_only_lacked_its_move_is_moved(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Killed between the two moves of an overwrite: the old one is aside, and so is the new one.
    aside = folder / ".incomplete"
    aside.mkdir()
    shutil.copytree(step(folder, 4), aside / "replaced")
    step(folder, 5).rename(aside / "checkpoint-5")
    colour_run(folder, regularizers=with_state(), **SAVING).train(resume_from_checkpoint=True)
    assert last_checkpoint(folder) == step(folder, 5)
    assert "moved there" in caplog.text
    assert not aside.exists()


def test_a_checkpoint_of_another_trainer_needs_a_state(folder: Path) -> None:
    (step(folder, 5) / "checkpoint.json").unlink()
    assert last_checkpoint(folder) == step(folder, 5)
    (step(folder, 5) / "trainer_state.json").write_text("{")
    assert last_checkpoint(folder) == step(folder, 4)


def test_the_limit_counts_and_the_best_stays(tmp_path: Path) -> None:
    class Scores(TrainerCallback):
        """Makes the second evaluation the best."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["metrics"]["eval_score"] = [1.0, 3.0, 2.0, 0.0, 2.5][state.global_step - 1]

    run = colour_run(
        tmp_path,
        **SAVING,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="score",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Weights(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = weights(run)

    run.add_callback(Scores())
    run.add_callback(Weights())
    run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-5"]
    assert run.state.best_model_checkpoint == str(step(tmp_path, 2))
    for number in (2, 5):
        state = json.loads((step(tmp_path, number) / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(step(tmp_path, 2))
    assert all(torch.equal(w, seen[2][name]) for name, w in weights(run).items())
    assert not all(torch.equal(w, seen[5][name]) for name, w in weights(run).items())


def test_only_the_model(tmp_path: Path) -> None:
    run = colour_run(tmp_path, regularizers=with_state(), **SAVING, save_only_model=True)
    run.train()
    names = {path.name for path in step(tmp_path, 5).iterdir()}
    assert not names & {"optimizer.pt", "rng_state.pth", "regularizers.safetensors"}
    assert last_checkpoint(tmp_path) == step(tmp_path, 5)
    with pytest.raises(ValueError, match="save_only_model"):
        colour_run(tmp_path, regularizers=with_state(), **SAVING).train(
            resume_from_checkpoint=str(step(tmp_path, 3))
        )


def test_an_earlier_runs_checkpoints_are_overwritten(folder: Path) -> None:
    before = (step(folder, 2) / "adapter_model.safetensors").read_bytes()
    (step(folder, 2) / "of-the-earlier-run.txt").write_text("")
    run = colour_run(folder, **{**SAVING, "max_steps": 2})
    run.train()
    assert (step(folder, 2) / "adapter_model.safetensors").read_bytes() != before
    assert not (step(folder, 2) / "of-the-earlier-run.txt").exists()
    assert not (folder / ".incomplete").exists()


def test_a_second_run_of_one_trainer_starts_anew(folder: Path) -> None:
    run = colour_run(folder, regularizers=with_state(), **{**SAVING, "max_steps": 3})
    run.train(resume_from_checkpoint=str(step(folder, 2)))
    started = weights(run)
    run.train()
    # The distance is to where this run started, not to what the checkpoint remembers.
    (distance,) = [r for r in run.regularization.regularizers if r.name == "l2_to_start"]
    assert all(torch.equal(w, started[name]) for name, w in distance.state_dict().items())


def test_pushes_come_from_the_final_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[str, bool]] = []
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(
        "transformers.Trainer._push_from_checkpoint",
        lambda self, place: pushed.append((place, Path(place, "checkpoint.json").is_file())),
    )
    run = colour_run(
        tmp_path, **{**SAVING, "max_steps": 2}, push_to_hub=True, hub_model_id="someone/adapter"
    )
    run.train()
    assert pushed == [(str(step(tmp_path, number)), True) for number in (1, 2)]


# Full disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 600 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_ends_in_one_line(small_disk: Path, tmp_path: Path) -> None:
    options = {**SAVING, "max_steps": 30}
    run = colour_run(small_disk, regularizers=with_state(), **options)
    with pytest.raises(CheckpointError, match=r"could not write checkpoint-\d+") as failed:
        run.train()
    assert "\n" not in str(failed.value)
    last = last_checkpoint(small_disk)
    assert last is not None
    assert f"the last good one is {last}" in str(failed.value)
    assert not (small_disk / ".incomplete").exists()
    # With room again, the run goes on as if nothing had been.
    moved = Path(shutil.copytree(small_disk, tmp_path / "roomy"))
    done = run.state.global_step
    resumed = colour_run(moved, regularizers=with_state(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[: done - 1] == losses(run)[: done - 1]
    assert resumed.state.global_step == 30


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    succeed(train_with_a_limit, tmp_path)
    assert last_checkpoint(tmp_path) == step(tmp_path, 5)


def test_a_place_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = colour_run(tmp_path / "run", **SAVING)
    run.args.output_dir = str(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match=r"could not write checkpoint-1.*none before it"):
        run.train()


# Weights that are not finite.


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(p for p in kwargs["model"].parameters() if p.requires_grad).data.fill_(
                    float("inf")
                )

    run = colour_run(tmp_path, **SAVING, save_total_limit=1)
    run.add_callback(Overflow())
    with pytest.raises(FloatingPointError, match=r"after step 3 of 5.*lower learning_rate"):
        run.train()
    assert last_checkpoint(tmp_path) == step(tmp_path, 2)
    resumed = colour_run(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


def test_arguments_are_kept_as_json(folder: Path) -> None:
    saved = json.loads((step(folder, 1) / "training_args.json").read_text())
    assert saved["learning_rate"] == arguments(folder).learning_rate
    assert not (step(folder, 1) / "training_args.bin").exists()

"""Masks under the trainer: selection when it starts, and checkpoints that hold the scores."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftune
from graftune.adapters import mask_tuning
from graftune.adapters.mask_tuning import is_pending
from support.processes import launch, succeed
from support.training import colour_run, go_on, weights

RUN: dict[str, Any] = {
    "method": "mask_tuning",
    "rows": 12,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 3e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
}


def scores(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")


def adapter(folder: Path) -> bytes:
    return (folder / "final" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("fraction", [None, 0.2])
def test_killed_and_resumed_it_ends_with_the_same_scores(
    tmp_path: Path, fraction: float | None
) -> None:
    options = {**RUN, "fraction": fraction}
    succeed(go_on, tmp_path / "whole", None, options)
    assert launch(go_on, tmp_path / "killed", ("gradient", 2, 0), options) == [-signal.SIGKILL]
    succeed(go_on, tmp_path / "killed", None, options)
    whole, killed = (scores(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    kinds = {torch.float32} if fraction is None else {torch.float32, torch.int32}
    assert {tensor.dtype for tensor in whole.values()} == kinds
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "killed")
    final = load_file(tmp_path / "whole" / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in final.values()} == {torch.uint8}


def test_a_pending_selection_is_made_once_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = colour_run(tmp_path, **{**RUN, "fraction": 0.1})
    assert is_pending(run.model, "default")
    loader = run.get_train_dataloader()
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.WARNING):
        run.select_weights(loader)
        run.select_weights(loader)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not is_pending(run.model, "default")
    assert len([r for r in caplog.records if "most important weights" in r.message]) == 1
    run.train()
    assert any((tensor <= 0.005).any() for tensor in weights(run).values())


def test_the_best_checkpoint_and_an_adapter_s_folder_are_read_alike(tmp_path: Path) -> None:
    run = colour_run(tmp_path, **RUN)
    run.train()
    run.save_model(str(tmp_path / "final"))
    base = run.model.unload()
    masks = []
    for folder in (tmp_path / "final", tmp_path / "checkpoint-4"):
        loaded = graftune.load(base, folder)
        masks.append(mask_tuning.export_released(loaded))
        base = loaded.unload()
    assert masks[0] == masks[1]


@pytest.mark.slow
def test_two_processes_select_the_same_weights(tmp_path: Path) -> None:
    options = {**RUN, "fraction": 0.2, "per_device_train_batch_size": 2}
    succeed(go_on, tmp_path / "whole", None, options, processes=2)
    codes = launch(go_on, tmp_path / "killed", ("gradient", 2, 1), options, processes=2)
    assert codes[1] == -signal.SIGKILL
    succeed(go_on, tmp_path / "killed", None, options, processes=2)
    whole, killed = (scores(tmp_path / name) for name in ("whole", "killed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name

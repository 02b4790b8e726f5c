"""SaRA's recipe in the trainer, with its release half-way: killed and resumed, and in processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.processes import launch, succeed
from support.released import STEPS, go_on, released, released_run, split


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    succeed(go_on, folder, None)
    return (folder / "final" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        [("begin", 2)],  # before the release
        [("gradient", 2), ("begin", 3)],  # in the step before it, and in the one after
        [("after save_model", 3)],  # the checkpoint right after it is not whole
        [("end", 4), ("saved", 5)],
    ],
    ids=["before", "around", "while saving", "after"],
)
def test_killed_and_resumed_bit_for_bit(
    kills: list[tuple[str, int]], uninterrupted: bytes, tmp_path: Path
) -> None:
    for where, step in kills:
        assert launch(go_on, tmp_path, (where, step, 0)) == [-signal.SIGKILL]
    succeed(go_on, tmp_path, None)
    assert (tmp_path / "final" / "adapter_model.safetensors").read_bytes() == uninterrupted


def test_what_was_released_stays_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = released_run(tmp_path, save_strategy="steps", save_steps=1)
    run.train()
    frozen = released(run)
    assert sum(int(mask.sum()) for mask in frozen.values()) > 0
    at_release = stored_values(tmp_path / f"checkpoint-{STEPS // 2}")
    at_end = stored_values(tmp_path / f"checkpoint-{STEPS}")
    for name, mask in frozen.items():
        key = name.replace(".default", "").replace(".base_layer", "")
        assert torch.equal(at_end[key][mask], at_release[key][mask])
    moved = sum(int((at_end[key] != at_release[key]).sum()) for key in at_end)
    still = sum(int(mask.sum()) for mask in frozen.values())
    assert moved == sum(tensor.numel() for tensor in at_end.values()) - still


def stored_values(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".sara_values." in name}


@pytest.mark.slow
def test_two_processes_train_and_release_as_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    succeed(split, tmp_path / "one")
    succeed(split, tmp_path / "two", processes=2)
    one = torch.load(tmp_path / "one" / "found-0.pt")
    first, second = (torch.load(tmp_path / "two" / f"found-{rank}.pt") for rank in (0, 1))
    assert one["released"].keys() == first["released"].keys() == second["released"].keys()
    for name, mask in one["released"].items():
        assert torch.equal(first["released"][name], second["released"][name])
        assert (first["released"][name] == mask).float().mean() > 0.99
    for name, values in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], values, rtol=1e-3, atol=1e-5)

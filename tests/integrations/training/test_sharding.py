"""Sharded by torch's `fully_shard`, an adapted model trains and is saved as a whole one.

What only a GPU can show: Accelerate's own FSDP, which falls back to DDP without one, with its
wrapping by class, its checkpoints and CPU offload; mixed precision of shards; DeepSpeed's engine.
Here the same calls of torch's, which Accelerate makes, run over gloo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.processes import succeed
from support.sharded import VARIANTS, batch_of, model_of, sharded_runs, train

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("variant", VARIANTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharded")
    succeed(sharded_runs, place, processes=2)
    return place


@pytest.fixture
def whole(variant: str) -> dict[str, Any]:
    """What the unsharded model does with both processes' batches."""
    return train(model_of(variant).train(), batch_of(0, 1))


def found(folder: Path, variant: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"{variant}-{rank}.pt")


def test_it_trains_as_the_whole_model(variant: str, whole: dict[str, Any], folder: Path) -> None:
    for rank in (0, 1):
        sharded = found(folder, variant, rank)
        for one, other in zip(sharded["gradients"], whole["gradients"], strict=True):
            assert one.keys() == other.keys()
            for name, gradient in other.items():
                torch.testing.assert_close(one[name], gradient, rtol=1e-4, atol=1e-6)
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(sharded["weights"][name], weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sharded["logits"], whole["logits"], rtol=1e-4, atol=1e-5)


def test_terms_of_weights_are_those_of_the_whole_weights(
    variant: str, whole: dict[str, Any], folder: Path
) -> None:
    for rank in (0, 1):
        for one, other in zip(found(folder, variant, rank)["terms"], whole["terms"], strict=True):
            for name in ("l2_to_start", "test_of_merged"):
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7)


def test_the_regularizers_state_is_whole(variant: str, whole: dict[str, Any], folder: Path) -> None:
    for rank in (0, 1):
        sharded = found(folder, variant, rank)
        assert sharded["resumes"]
        starts = sharded["state"]["regularizers"]["l2_to_start"]
        for name, start in whole["state"]["regularizers"]["l2_to_start"].items():
            assert type(starts[name]) is torch.Tensor
            assert torch.equal(starts[name], start)


def test_the_trainer_saves_the_whole_adapter(
    variant: str, whole: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    model = model_of(variant)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(found(folder, variant, 0)["weights"][name])
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    saved = load_file(folder / f"{variant}-trainer" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_the_models_own_saving_writes_nothing_in_parts(variant: str, folder: Path) -> None:
    assert not (folder / f"{variant}-alone" / "adapter_model.safetensors").exists()
    refused = found(folder, variant, 0)["refused"]
    if variant == "lora":  # PEFT's own method: its writer fails
        assert refused != "saved"
    else:
        assert refused.startswith("ValueError")
        assert "spread over processes" in refused
        assert "whole_state_dict" in refused

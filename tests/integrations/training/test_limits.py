"""What regularizers cannot do is said before training starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graftune
from graftune.adapters.regularizers import Regularizer, Run
from graftune.integrations.training.limits import check_limits
from support.training import Opposing, Wandering, adapted, arguments, sentences


def trainer(
    deepspeed: bool = False, fsdp: int = 0, processes: int = 2, reentrant: bool = False
) -> Any:
    kwargs = {"use_reentrant": reentrant}
    args = SimpleNamespace(
        world_size=processes,
        gradient_checkpointing=reentrant,
        gradient_checkpointing_kwargs=kwargs,
    )
    return SimpleNamespace(
        args=args,
        is_deepspeed_enabled=deepspeed,
        is_fsdp_enabled=bool(fsdp),
        accelerator=SimpleNamespace(is_fsdp2=fsdp == 2),
    )


DISTANCE, DISTILLATION = graftune.L2ToStart(), graftune.FrozenDistillation()


@pytest.mark.parametrize(
    ("regularizer", "given", "message"),
    [
        (Opposing(), {"deepspeed": True}, r"'test_opposing' need gradients, which DeepSpeed"),
        (DISTILLATION, {"fsdp": 1}, r"'frozen_distillation' need the parameters.*fsdp_version: 2"),
        (Opposing(), {"fsdp": 2}, r"'test_opposing' need gradients of terms by.*FSDP"),
        (Opposing(), {"reentrant": True}, r"'test_opposing': reentrant.*of terms by"),
        (DISTANCE, {"reentrant": True}, r"'l2_to_start': reentrant.*breaks under DDP"),
    ],
)
def test_refused(regularizer: Regularizer, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_limits([regularizer], trainer(**given))
    check_limits([], trainer(**given))


@pytest.mark.parametrize(
    ("regularizer", "given"),
    [
        (Opposing(), {}),
        (Wandering(), {"deepspeed": True}),
        (DISTANCE, {"deepspeed": True}),
        (DISTANCE, {"fsdp": 2}),
        (DISTILLATION, {"fsdp": 2}),
        (DISTANCE, {"reentrant": True, "processes": 1}),
    ],
)
def test_allowed(regularizer: Regularizer, given: dict[str, Any]) -> None:
    check_limits([regularizer], trainer(**given))


def test_the_trainer_asks_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = graftune.Trainer.create_accelerator_and_postprocess

    def under_deepspeed(self: Any) -> None:
        original(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(graftune.Trainer, "create_accelerator_and_postprocess", under_deepspeed)
    with pytest.raises(ValueError, match="DeepSpeed"):
        graftune.Trainer(
            adapted("flora", "transformers-llama"),
            arguments(tmp_path),
            train_dataset=sentences(8),
            regularizers=[Opposing()],
        )


def test_empty_weights_have_no_distance_and_no_mean() -> None:
    # As DeepSpeed ZeRO-3 leaves them outside of the forward pass.
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"those of this process are empty.*ZeRO-3"):
        graftune.L2ToStart().check(model)
    with pytest.raises(ValueError, match=r"averages weights, and those of this process are empty"):
        graftune.GaussianAveraging().check(model)
    graftune.FrozenDistillation().check(model)
    assert Run(model, 1, 1).trained()


def test_an_empty_adapter_is_never_written(tmp_path: Path) -> None:
    # transformers' way out where ZeRO-3 has nothing whole to save.
    run = graftune.Trainer(
        adapted("lora", "transformers-llama"), arguments(tmp_path), train_dataset=sentences(8)
    )
    hollow = {name: tensor[:0] for name, tensor in run.model.state_dict().items()}
    for state in ({}, hollow):
        with pytest.raises(ValueError, match="nothing was written"):
            run._save(str(tmp_path / "adapter"), state)
    assert not (tmp_path / "adapter").exists()

"""A run of SaRA in the trainer that releases half-way, to be killed, resumed and split."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graftune
from support.clip import colours
from support.training import Killer, arguments, kill_while_saving, weights

STEPS = 6  # the release is after the third


def base() -> Any:
    """A small ViT with matrices that are large enough for a nuclear norm."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=68,
            intermediate_size=72,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            num_labels=4,
        )
    )


def released_run(folder: Path, **overrides: Any) -> graftune.Trainer:
    """Train by the recipe's regularizers, on eight pictures a step, of however many processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options = {
        "per_device_train_batch_size": 8 // processes,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    }
    return graftune.Trainer(
        graftune.wrap(base(), "sara", fraction=0.2, regularizers=[]),
        arguments(folder, **{**options, **overrides}),
        objective=graftune.ImageClassifier(),
        train_dataset=colours(24),
        regularizers=[graftune.NuclearNorm(1e-3), graftune.ProgressiveRelease(0.5)],
    )


def go_on(folder: Path, kill: tuple[str, int, int] | None) -> None:
    """Go on with the run, or start it, until it is done or killed; keep what it ends with."""
    run = released_run(folder, save_strategy="steps", save_steps=1)
    if kill is not None:
        killer = Killer(*kill)
        run.add_callback(killer)
        kill_while_saving(run, killer)
    run.train(resume_from_checkpoint=graftune.last_checkpoint(folder))
    run.save_model(str(folder / "final"))


def split(folder: Path) -> None:
    """Do the run by gradient descent, and leave this process's weights and what is released.

    Adam would make much of the sign of what is nearly zero.
    """
    run = released_run(folder, optim="sgd", learning_rate=0.1, weight_decay=0.0)
    run.train()
    found = {"weights": weights(run), "released": released(run)}
    torch.save(found, folder / f"found-{os.environ.get('RANK', '0')}.pt")


def released(run: graftune.Trainer) -> dict[str, Tensor]:
    """Which entries do not move any more, by name."""
    (regularizer,) = (
        r for r in run.regularization.regularizers if isinstance(r, graftune.ProgressiveRelease)
    )
    return dict(regularizer.state_dict()["frozen"])

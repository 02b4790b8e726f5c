"""The recipe in the trainer: in half precision, recomputed, resumed, with classes swapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftune
from graftune.integrations.objectives import ClassNameClassifier
from graftune.integrations.schedules import cosine_rates
from support.clip import COLOURS, clip, colours
from support.training import arguments

NAMES = list(COLOURS)
FAMILIES = pytest.mark.parametrize("family", ["transformers-clip", "open_clip-vit"])
REGULARIZERS = [
    graftune.SelfRegulation(templates=["a photo of a {}.", "a drawing of the {}"]),
    graftune.GaussianAveraging(mean=2, std=1),
]


def trainer(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> graftune.Trainer:
    base, tokenizer = clip(family)
    torch.manual_seed(0)
    options: dict[str, Any] = {"depth_text": 2, "depth_vision": 2, "init_text": None}
    model = graftune.wrap(base.to(dtype), "promptsrc", regularizers=REGULARIZERS, **options)
    settings = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 0.0025, "optim": "sgd"}
    settings |= {"optim_args": "momentum=0.9", "weight_decay": 5e-4}
    return graftune.Trainer(
        model,
        arguments(folder, **{**settings, **overrides}),
        objective=ClassNameClassifier(NAMES, tokenizer),
        train_dataset=[
            {**row, "pixel_values": row["pixel_values"].to(dtype)} for row in colours(16)
        ],
        eval_dataset=[{**row, "pixel_values": row["pixel_values"].to(dtype)} for row in colours(8)],
        epoch_rates=cosine_rates(3, 0.0025, 1e-5),
    )


def prompts(run: graftune.Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])


@FAMILIES
@pytest.mark.parametrize(
    "how",
    [{"bf16": True}, {"dtype": torch.bfloat16}, {"gradient_checkpointing": True}],
    ids=["autocast", "bf16 weights", "recomputed"],
)
def test_it_trains_in_half_precision_and_recomputed(
    family: str, how: dict[str, Any], tmp_path: Path
) -> None:
    exact, other = trainer(tmp_path, family), trainer(tmp_path, family, **how)
    start = prompts(other)
    assert start.dtype == torch.float32
    for run in (exact, other):
        run.train()
    assert (prompts(other) - start).norm() > 0
    within = 1e-5 if "gradient_checkpointing" in how else 0.3
    assert (prompts(other) - prompts(exact)).norm() < within * (prompts(exact) - start).norm()
    for run in (exact, other):  # swapped after training, in whatever precision
        run.objective = run.objective.with_class_names(["grey", "drawing"])
        run.evaluate([{**row, "labels": row["labels"] % 2} for row in run.eval_dataset])


@FAMILIES
def test_a_resumed_run_ends_with_the_same_prompts(family: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path, family, save_strategy="steps", save_steps=3, eval_strategy="epoch")
    whole.train()
    resumed = trainer(tmp_path, family)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(prompts(resumed), prompts(whole))

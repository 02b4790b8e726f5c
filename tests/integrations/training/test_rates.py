"""Each epoch has its learning rate, in resumed runs and several processes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftune
from graftune.integrations.objectives import ClassNameClassifier
from graftune.integrations.schedules import cosine_rates
from support.clip import COLOURS, clip, colours
from support.processes import succeed
from support.training import arguments

RATES = cosine_rates(3, 0.0025, 1e-5)
PAPER = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4}


def trainer(folder: Path, rates: Any = RATES, **overrides: Any) -> graftune.Trainer:
    base, tokenizer = clip()
    torch.manual_seed(0)
    options = {"depth_text": 2, "depth_vision": 2}
    options |= {"regularizers": [graftune.GaussianAveraging(2, 1)]}
    model = graftune.wrap(base, "promptsrc", tokenizer=tokenizer, **options)
    settings = {"learning_rate": 0.0025, "max_steps": -1, "num_train_epochs": 3, **PAPER}
    return graftune.Trainer(
        model,
        arguments(folder, **{**settings, **overrides}),
        objective=ClassNameClassifier(list(COLOURS), tokenizer),
        train_dataset=colours(20),
        epoch_rates=rates,
    )


def logged(run: graftune.Trainer) -> list[float]:
    return [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]


def prompts(run: graftune.Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters() if p.requires_grad]


def test_a_run_has_the_rates_and_the_optimizer_of_the_paper(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    assert logged(run) == pytest.approx([rate for rate in RATES for _ in range(3)])
    groups = [group for group in run.optimizer.param_groups if group["params"]]
    assert sum(len(group["params"]) for group in groups) == 2
    for group in groups:
        assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


def test_a_resumed_run_goes_on_with_its_rates(tmp_path: Path) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed) == logged(whole)
    assert all(map(torch.equal, prompts(resumed), prompts(whole)))


def test_max_steps_spread_the_rates(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=6)
    run.train()
    assert logged(run) == pytest.approx([rate for rate in RATES for _ in range(2)])


def in_two_processes(folder: Path) -> None:
    run = trainer(folder, per_device_train_batch_size=4)
    run.train()
    assert logged(run) == pytest.approx([rate for rate in RATES for _ in range(3)])
    run.end()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    succeed(in_two_processes, tmp_path, processes=2)


def test_another_number_of_rates_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 rates for 3 epochs; give one for each"):
        trainer(tmp_path, rates=[0.1, 0.2])

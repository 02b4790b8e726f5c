"""Small sequences of tasks, to be interrupted, gone on with and compared."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune
from graftune.adapters.regularizers import (
    ElasticWeightConsolidation,
    PreviousDistillation,
    VirtualOutliers,
)
from graftune.integrations.class_incremental import (
    ClassIncrementalTrainer,
    TaskSplit,
    split_tasks,
)
from support.models import MODELS
from support.training import arguments

CLASSES = 6


def images(each: int = 4, seed: int = 0, classes: int = CLASSES) -> list[dict[str, Any]]:
    """Noisy pictures, each class around a picture of its own."""
    own = torch.randn(classes, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    noise = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": own[label] + 0.3 * torch.randn(3, 32, 32, generator=noise),
            "labels": label,
        }
        for label in range(classes)
        for _ in range(each)
    ]


def split(tasks: Any = 3, seed: int | None = 0) -> TaskSplit:
    """The pictures in tasks."""
    return split_tasks(images(), tasks, seed=seed, label="labels")


def outliers(**settings: Any) -> VirtualOutliers:
    """Virtual outliers of few images, with a term that counts."""
    small = {"neighbours": 2, "select": 2, "samples": 4, "per_class": 3, "inside_energy": -5.0}
    return VirtualOutliers(**{**small, **settings})


def adapted(method: str = "ovor", model: str = "transformers-vit", **options: Any) -> Any:
    """A small vision transformer with an adapter and its classifier."""
    torch.manual_seed(1)
    head = "classifier" if model.startswith("transformers") else "head"
    if method == "ovor":
        options = {"lengths": [4, 2], **options}
    return graftune.wrap(MODELS[model].build(), method, modules_to_save=[head], **options)


def sequence(
    folder: Path,
    *,
    model: Any = None,
    train: TaskSplit | None = None,
    regularizers: Any = None,
    head: str = "classifier",
    arguments_: dict[str, Any] | None = None,
    **options: Any,
) -> ClassIncrementalTrainer:
    """A trainer of three tasks of two classes."""
    train = split() if train is None else train
    last = len(train.order.names)
    options.setdefault("test", train.order.split(images(2, seed=1, classes=last), label="labels"))
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    return ClassIncrementalTrainer(
        adapted() if model is None else model,
        arguments(folder, **{**settings, **(arguments_ or {})}),
        train=train,
        head=head,
        outlier_epochs=options.pop("outlier_epochs", 2),
        regularizers=[outliers()] if regularizers is None else regularizers,
        **options,
    )


def interrupt(patch: pytest.MonkeyPatch, at: str, count: int, how: Any) -> None:
    """Let something happen at the so-many-th call of one of a run's steps."""
    from graftune.integrations.class_incremental import trainer as module

    owners: dict[str, Any] = {
        "training_step": graftune.Trainer,
        "_measure": ClassIncrementalTrainer,
        "_consolidate": ClassIncrementalTrainer,
        "list_files": module,
        "move": module,
    }
    original = getattr(owners[at], at)
    calls = iter(range(1, 1_000_000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            how()
        return original(*args, **kwargs)

    patch.setattr(owners[at], at, interrupted)


def killed_or_done(folder: Path, at: str | None, count: int) -> None:
    """Go on with a sequence of tasks in a process of its own, which may kill itself."""
    with pytest.MonkeyPatch.context() as patch:
        if at is not None:
            interrupt(patch, at, count, lambda: os.kill(os.getpid(), signal.SIGKILL))
        trainer = sequence(folder)
        trainer.train(resume=True)
        trainer.end()


def learned_by_many(folder: Path) -> None:
    """Learn tasks in batches of eight, of however many processes; each leaves what it ended with.

    By gradient descent: Adam would make much of the sign of what is nearly zero.
    """
    processes, rank = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
    drawn: list[torch.Tensor] = []

    class Recorded(VirtualOutliers):
        def prepare(self, *args: Any, **kwargs: Any) -> None:
            super().prepare(*args, **kwargs)
            drawn.append(self._outliers.clone())

    virtual = Recorded(neighbours=2, select=2, samples=4, per_class=3, inside_energy=-5.0)
    trainer = sequence(
        folder,
        regularizers=[ElasticWeightConsolidation(1.0), PreviousDistillation(0.5), virtual],
        arguments_={
            "per_device_train_batch_size": 8 // processes,
            "per_device_eval_batch_size": 4 // processes,
            "optim": "sgd",
            "learning_rate": 0.05,
            "save_strategy": "no",
        },
    )
    record = trainer.train()
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    found = {"weights": weights, "outliers": drawn, "accuracies": record.accuracies}
    torch.save(found, folder.with_name(f"{folder.name}-{rank}.pt"))
    trainer.end()

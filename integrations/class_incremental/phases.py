"""What a task's training consists of: arguments of its phases, features that are kept, answers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from graftune.adapters.base.classifier import mask_classes
from graftune.integrations.class_incremental.objectives import TaskClassifier, percent_right
from graftune.integrations.objectives.labels import IGNORED
from graftune.integrations.training import Trainer


def phase_arguments(
    arguments: TrainingArguments, folder: Path, seed: int, epochs: int | None = None
) -> TrainingArguments:
    """Return training arguments for one phase of one task.

    Args:
        arguments: those of the whole sequence.
        folder: where the phase has its checkpoints.
        seed: of the task.
        epochs: None keeps the given epochs, or steps.
    """
    phase = copy.copy(arguments)
    phase.output_dir, phase.seed = str(folder), seed
    # Tasks are evaluated when they are finished, and published by whoever trains them.
    phase.eval_strategy, phase.load_best_model_at_end = IntervalStrategy.NO, False
    phase.push_to_hub = False
    if epochs is not None:
        phase.num_train_epochs, phase.max_steps = epochs, -1
    return phase


def batches(trainer: Trainer, data: Any) -> Iterator[dict[str, Any]]:
    """Yield this process's batches of a data set, in order."""
    for batch in trainer.get_eval_dataloader(data):
        yield trainer._prepare_inputs(batch)


@torch.no_grad()
def features_of(trainer: Trainer, data: Any, objective: TaskClassifier) -> tuple[Tensor, Tensor]:
    """Return what enters the classifier, (M, D), and the labels, (M,), in all processes alike.

    Images whose label does not count are left out.
    """
    model: Any = trainer.model
    model.eval()
    features, labels = [], []
    for batch in batches(trainer, data):
        with trainer.compute_loss_context_manager():
            entered = objective(model, **batch, features=True)["features"]["image"]
        pair = trainer.accelerator.gather_for_metrics((entered.float(), batch["labels"]))
        features.append(pair[0].cpu())
        labels.append(pair[1].cpu())
    every, of_every = torch.cat(features), torch.cat(labels)
    return every[of_every != IGNORED], of_every[of_every != IGNORED]


def as_rows(features: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Return kept features as rows for a trainer."""
    return [{"cached": f, "labels": y} for f, y in zip(features, labels, strict=True)]


def stacked(rows: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Collate rows of kept features."""
    rows = list(rows)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def measured(
    trainer: Trainer, data: Any, outputs: range, head: str, of_task: range
) -> tuple[float, float]:
    """Return the accuracies in percent on a task's images: among all classes, among its own."""
    trainer.objective = TaskClassifier(outputs, head=head)
    predicted: Any = trainer.predict(data)
    logits, labels = predicted.predictions, predicted.label_ids
    return percent_right(logits, labels), percent_right(logits, labels, of_task)


class MaskedLogits:
    """An objective's call that returns logits that are −∞ for the classes of other tasks."""

    def __init__(self, objective: TaskClassifier) -> None:
        self.objective = objective

    def __call__(self, model: nn.Module, **batch: Any) -> dict[str, Tensor]:
        """Return the logits, (B, C), of a batch."""
        logits = self.objective(model, **batch)["logits"]
        return {"logits": mask_classes(logits, list(self.objective.outputs))}

"""What claims about class-incremental learning are measured with: learners on the embedded tasks.

A learner is an adapter with regularizers, and `ClassIncrementalTrainer` trains it on one task after
the other. Virtual outliers act in a phase of their own, on features that are kept and on the
classifier's rows of the task's classes; no later task touches these rows or depends on them. So
what a run without outliers has left of each task is enough to say, exactly, what it would have come
to with outliers of any setting.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measure import flops
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import graftune
from embedded.increments import Rows, load_increments, vision_tower
from graftune.integrations.class_incremental import ClassIncrementalTrainer, TaskRecord
from graftune.integrations.class_incremental.objectives import (
    CachedClassifier,
    TaskClassifier,
    percent_right,
)
from graftune.integrations.class_incremental.phases import as_rows, phase_arguments, stacked

HEAD = "classifier"


@dataclass(frozen=True)
class Learner:
    """A way of learning the tasks.

    Args:
        name: what it is called in tables.
        wrap: attaches the adapter, given the base model and the weight of its regularizer.
        rates: learning rates to choose from.
        weights: of the regularizer, to choose from.
        of: the name of the learner whose rate it takes, instead of choosing one.
        outliers: whether it is measured with virtual outliers as well.
    """

    name: str
    wrap: Callable[[nn.Module, float], nn.Module]
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    weights: tuple[float, ...] = (0.0,)
    of: str | None = None
    outliers: bool = False


@dataclass(frozen=True)
class Settings:
    """What all learners share."""

    tasks: int = 10
    epochs: int = 8
    outlier_epochs: int = 2
    batch: int = 16
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    search_seed: int = 100
    outlier_weights: tuple[float, ...] = (0.1, 1.0)
    sigmas: tuple[float, ...] = (0.1, 1.0)
    neighbours: int = 4  # of 12 pictures of a class
    select: int = 4

    def arguments(self, folder: str | Path, rate: float, seed: int) -> TrainingArguments:
        """Return the training arguments of a task."""
        return TrainingArguments(
            str(folder),
            learning_rate=rate,
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=512,
            lr_scheduler_type="cosine",
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )


@dataclass(frozen=True)
class AfterTask:
    """What is left of one task before its outlier phase.

    Args:
        features: of the task's images, (M, D).
        labels: their classes, (M,).
        weight: the classifier's rows of the task's classes, (C, D).
        bias: the same of its bias, (C,).
        asked: features of the images that are measured, of this task and each before, (N, D).
        answers: their classes, (N,).
    """

    features: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor
    asked: list[Tensor]
    answers: list[Tensor]


@dataclass(frozen=True)
class Run:
    """A learner that has learned all tasks of a seed."""

    record: TaskRecord
    trained: int  # numbers of the adapter, without the classifier
    forwards: int  # passes through the tower for an image
    operations: float  # of an image, over the base model's
    left: tuple[AfterTask, ...]  # where outliers are measured as well


def learn(
    learner: Learner, rate: float, weight: float, seed: int, split: str, settings: Settings
) -> Run:
    """Let a learner learn the tasks of a seed, and measure it on a split of them.

    Args:
        learner: what learns.
        rate: the learning rate.
        weight: of its regularizer.
        seed: of the tasks and of all else that is drawn.
        split: "validation" or "test".
        settings: what all learners share.
    """
    data = load_increments(seed, settings.tasks)
    asked = getattr(data, split)
    set_seed(seed)
    model = learner.wrap(vision_tower(), weight)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ClassIncrementalTrainer(
            model,
            settings.arguments(folder, rate, seed),
            train=data.train,
            test=asked,
            head=HEAD,
        )
        with contextlib.redirect_stdout(None):  # a line of losses a phase
            record = trainer.train()
        tasks = range(settings.tasks) if learner.outliers else ()
        left = [after_task(Path(folder, f"task-{t}"), data.train.parts, asked, t) for t in tasks]
    own = (p for n, p in model.named_parameters() if p.requires_grad and HEAD not in n)
    trained = sum(p.numel() for p in own)
    return Run(record, trained, forwards(model), operations(model) / of_base(), tuple(left))


def after_task(folder: Path, train: Sequence[Rows], asked: Sequence[Rows], task: int) -> AfterTask:
    """Return what a finished task has left in its folder."""
    model: Any = graftune.load(vision_tower(), folder).eval()
    features, labels = features_of(model, train[task])
    found = [features_of(model, rows) for rows in asked[: task + 1]]
    layer = model.get_base_model().get_submodule(HEAD).modules_to_save["default"]
    count = len(labels.unique())
    return AfterTask(
        features,
        labels,
        layer.weight.detach()[-count:].clone(),
        layer.bias.detach()[-count:].clone(),
        *map(list, zip(*found, strict=True)),
    )


@torch.no_grad()
def features_of(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return what enters the classifier, (N, D), and the labels, (N,)."""
    labels = torch.tensor([row["labels"] for row in rows])
    images = torch.stack([row["pixel_values"] for row in rows])
    objective = TaskClassifier(range(int(labels.max()) + 1), head=HEAD)
    found = objective(model, pixel_values=images, features=True)
    return found["features"]["image"], labels


def with_outliers(
    run: Run, outliers: graftune.VirtualOutliers, rate: float, seed: int, settings: Settings
) -> list[list[float]]:
    """Return the accuracies that a run comes to with an outlier phase after each task.

    Args:
        run: without outliers.
        outliers: with which the classifier is trained; of weight 0 it is only trained for longer.
        rate, seed, settings: those of the run.
    """
    width = run.left[0].features.shape[1]
    layer, accuracies = nn.Linear(width, 0), []
    for task, left in enumerate(run.left):
        layer = appended(layer, left)
        phase = seed + task
        tighten(layer, left, outliers, settings.arguments("", rate, phase), settings.outlier_epochs)
        with torch.no_grad():
            logits = [layer(asked).numpy() for asked in left.asked]
        answers = [labels.numpy() for labels in left.answers]
        accuracies.append([percent_right(*pair) for pair in zip(logits, answers, strict=True)])
    return accuracies


def appended(layer: nn.Linear, left: AfterTask) -> nn.Linear:
    """Return a classifier with the rows of another task."""
    grown = nn.Linear(layer.in_features, layer.out_features + len(left.bias))
    with torch.no_grad():
        grown.weight.copy_(torch.cat([layer.weight, left.weight]))
        grown.bias.copy_(torch.cat([layer.bias, left.bias]))
    return grown


def tighten(
    layer: nn.Linear,
    left: AfterTask,
    outliers: graftune.VirtualOutliers,
    arguments: TrainingArguments,
    epochs: int,
) -> None:
    """Train a classifier on a task's features and outliers, as ClassIncrementalTrainer does."""
    seed = arguments.seed
    set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    outliers.prepare(left.features, left.labels, head=layer, generator=generator)
    outputs = range(int(left.labels.min()), layer.out_features)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        graftune.Trainer(
            layer,
            phase_arguments(arguments, Path(folder), seed, epochs),
            objective=CachedClassifier(outputs),
            train_dataset=as_rows(left.features, left.labels),
            data_collator=stacked,
            regularizers=[outliers],
        ).train()
    outliers.clear()


@torch.no_grad()
def operations(model: nn.Module) -> int:
    """Return the operations of one image's logits."""
    image = torch.zeros(1, 3, 48, 48)
    return flops(lambda: model.eval()(pixel_values=image))


@cache
def of_base() -> int:
    """Return the same of the base model."""
    return operations(vision_tower())


@torch.no_grad()
def forwards(model: nn.Module) -> int:
    """Return how often an image goes through the tower."""
    counted: list[nn.Module] = []
    entry: Any = next(m for n, m in model.named_modules() if n.endswith("patch_embedding"))
    handle = entry.register_forward_pre_hook(lambda module, _: counted.append(module))
    model.eval()(pixel_values=torch.zeros(1, 3, 48, 48))
    handle.remove()
    return len(counted)

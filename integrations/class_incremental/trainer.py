"""Training on one task after the other, without the images of the earlier ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments, set_seed

from graftune.adapters.base.checkpoint import training_checkpoint
from graftune.adapters.base.classifier import grow_classifier, name_outputs
from graftune.adapters.base.folder import read_config
from graftune.adapters.base.messages import nearest
from graftune.adapters.prompts.pools import start_task
from graftune.adapters.prompts.pools.config import TaskPoolConfig
from graftune.adapters.regularizers import (
    ElasticWeightConsolidation,
    PreviousDistillation,
    Regularizer,
    VirtualOutliers,
    regularizer,
)
from graftune.adapters.regularizers.state_file import load_state, save_state
from graftune.integrations.class_incremental.objectives import CachedClassifier, TaskClassifier
from graftune.integrations.class_incremental.phases import (
    MaskedLogits,
    as_rows,
    features_of,
    measured,
    phase_arguments,
    stacked,
)
from graftune.integrations.class_incremental.record import TaskRecord, last_task, task_folder
from graftune.integrations.class_incremental.tasks import ClassOrder, TaskSplit
from graftune.integrations.training import Trainer, last_checkpoint, regularizers_of
from graftune.integrations.training.checkpoints import ASIDE
from graftune.integrations.training.regularized import STATE_FILE
from graftune.integrations.training.whole import list_files, move


class ClassIncrementalTrainer:
    """Train an adapter and a classifier on a sequence of tasks, by `Trainer` for each.

    A task has a normal phase, of the arguments' epochs, with the cross entropy over its own classes
    and all regularizers but `VirtualOutliers`. Where that is among them, an outlier phase follows,
    on features kept of the task's images, in which only the classifier is trained. Then all tasks
    so far are measured, among all classes so far, and the adapter with its classifier is in the
    folder "task-0", "task-1" and so on of the output folder, whole or not there, with a record of
    the class order, the accuracies and the seeds. Whatever ends a run leaves the tasks finished
    before; checkpoints of the current one are in "running-0" and so on.

    Args:
        model: what `graftune.wrap` returned, with the classifier in `modules_to_save`.
        args: training arguments of a task's normal phase; `seed` plus the task's number is the
            task's seed.
        train: the tasks, from `split_tasks`; images of finished tasks may be gone.
        test: the images that each task is measured on, from `train.order.split(test_data)`.
        head: the classifier's name in the base model, an `nn.Linear`.
        data_collator: rows to `pixel_values` and `labels`, as `ImageCollator` does.
        outlier_epochs: of the outlier phase; the paper's are 10 (after 40) and 4 (after 16).
        regularizers: as `Trainer` takes them.
        label_smoothing: of the cross entropy, 0 to 1.
        task_aware: whether to record the accuracies with the task known, too.

    Raises:
        ValueError: the classifier is not trained with the adapter, there are not as many tasks to
            measure as to train, the pool was made for fewer tasks, or a setting is out of range.
        TypeError: the model has no adapter.

    Example:
        >>> train = split_tasks(load_images("flowers"), tasks=10, seed=0)
        >>> test = train.order.split(load_images("flowers", split="test"))
        >>> model = graftune.wrap(vit, "ovor", modules_to_save=["classifier"])
        >>> trainer = ClassIncrementalTrainer(
        ...     model, TrainingArguments("out"), train=train, test=test, head="classifier",
        ...     data_collator=ImageCollator(processor))
        >>> print(trainer.train().summary())
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train: TaskSplit,
        test: Sequence[Any],
        head: str,
        data_collator: Any = None,
        outlier_epochs: int = 10,
        regularizers: Sequence[Regularizer | Mapping[str, Any]] | None = None,
        label_smoothing: float = 0.0,
        task_aware: bool = False,
    ) -> None:
        self.model: Any = model
        self.args = args
        self.order: ClassOrder = train.order
        self.parts, self.test = train.parts, list(test)
        self.head = head
        self.data_collator = data_collator
        self.outlier_epochs = outlier_epochs
        self.label_smoothing = label_smoothing
        self.task_aware = task_aware
        self._folder = Path(str(args.output_dir))
        self._trainer: Trainer | None = None
        _check(self)
        given = regularizers_of(model) if regularizers is None else map(regularizer, regularizers)
        self.regularizers: list[Regularizer] = list(given)

    def train(self, resume: bool | str | Path = False) -> TaskRecord:
        """Learn the tasks that are left, and return the record of all.

        Args:
            resume: True goes on where a run in the output folder ended, at its task and step, or
                starts where there is none. A finished task's folder goes on from that task.

        Raises:
            ValueError: the output folder has finished tasks and `resume` is False; a task to be
                learned has no images; the adapter to go on from is of another method.
            ClassListError: the adapter to go on from has learned other classes.
            FileNotFoundError: the folder to go on from is not that of a finished task.
        """
        record = self._begin(resume)
        try:
            for task in range(record.done, len(self.order.tasks)):
                record = self._learn(task, record, bool(resume))
        finally:
            for distillation in self._of(PreviousDistillation):
                distillation.forget(self.model)
        return record

    def end(self) -> None:
        """End the run in all processes together: call it last in a script."""
        if self._trainer is not None:
            self._trainer.end()

    def _begin(self, resume: bool | str | Path) -> TaskRecord:
        """Return how far the tasks are, with the model as it was then."""
        last = last_task(self._folder)
        if last is not None and not resume:
            raise ValueError(
                f"{self._folder} has finished tasks, the last of them in {last.name}; go on with "
                "train(resume=True), or choose another output_dir"
            )
        start = Path(resume) if isinstance(resume, str | Path) else last
        record = TaskRecord(self.order, self.args.seed)
        if start is not None:
            record = TaskRecord.read(start)
            record.check(self.order, start)
        for task in range(record.done, len(self.order.tasks)):
            if self.parts[task] is None or not len(self.parts[task]):
                raise ValueError(
                    f"task {task} has no images and is still to be learned; give its part of the "
                    "data, as `order.split` returns it"
                )
        if start is not None:
            self._load(start, record)
        return record

    def _load(self, folder: Path, record: TaskRecord) -> None:
        """Bring adapter, classifier and regularizers to where a task's folder has them."""
        name = self.model.active_adapter
        inner = _adapter_folder(folder, name)
        read: Any = read_config(inner)
        own, saved = self.model.active_peft_config.peft_type, read.peft_type
        if own != saved:
            raise ValueError(
                f"the adapter in {folder} is of the method {saved.value!r} and the model's of "
                f"{own.value!r}; wrap the model as it was, or load it with graftune.load"
            )
        self._grow(len(record.order.names))
        self.model.load_adapter(str(inner), name, is_trainable=True)
        self.model.set_adapter(name)
        start_task(self.model, record.done - 1)
        file = folder / STATE_FILE
        for elastic in self._of(ElasticWeightConsolidation):
            if not file.is_file():
                raise ValueError(
                    f"{folder} was written without {elastic.name!r}, which holds what earlier "
                    "tasks needed; go on without it, or start anew"
                )
            elastic.load_state_dict(load_state(file)[elastic.name])

    def _learn(self, task: int, record: TaskRecord, resume: bool) -> TaskRecord:
        seed = self.args.seed + task
        running = self._folder / f"running-{task}"
        if not resume and self.args.should_save:
            shutil.rmtree(running, ignore_errors=True)
        self._start_task(task, seed)
        outputs, part = self.order.outputs(task), self.parts[task]
        objective = TaskClassifier(outputs, self.label_smoothing, self.head)
        trainer = Trainer(
            self.model,
            phase_arguments(self.args, running / "normal", seed),
            objective=objective,
            train_dataset=part,
            data_collator=self.data_collator,
            regularizers=[r for r in self.regularizers if not isinstance(r, VirtualOutliers)],
        )
        self._trainer = trainer
        _run(trainer, resume)
        for outliers in self._of(VirtualOutliers):
            self._outlier_phase(trainer, objective, outliers, part, running, resume)
        self._consolidate(trainer, objective, part)
        record = self._measure(trainer, task, record)
        self._save(task, record, running)
        trainer.accelerator.wait_for_everyone()
        return record

    def _start_task(self, task: int, seed: int) -> None:
        """Let adapter, classifier and regularizers know that another task begins."""
        before = self.order.outputs(task).start
        for distillation in self._of(PreviousDistillation):
            distillation.forget(self.model)
            if task:
                distillation.keep(self.model, classes=before)
        start_task(self.model, task)
        set_seed(seed)  # the new rows
        self._grow(self.order.outputs(task).stop)

    def _grow(self, outputs: int) -> None:
        """Let the classifier have at least so many outputs, by name; it may have been larger."""
        grow_classifier(self.model, self.head, max(outputs, _layer(self).out_features))
        name_outputs(self.model, self.order.names[:outputs])

    def _outlier_phase(
        self,
        trainer: Trainer,
        objective: TaskClassifier,
        outliers: VirtualOutliers,
        part: Any,
        running: Path,
        resume: bool,
    ) -> None:
        """Train the classifier alone further, beside outliers around the task's classes."""
        seed = trainer.args.seed
        set_seed(seed)  # pictures may be drawn anew each time
        features, labels = features_of(trainer, part, objective)
        layer = _layer(self)
        generator = torch.Generator().manual_seed(seed)
        outliers.prepare(features, labels, head=layer, generator=generator)
        alone = Trainer(
            layer,
            phase_arguments(self.args, running / "outliers", seed, self.outlier_epochs),
            objective=CachedClassifier(objective.outputs, self.label_smoothing),
            train_dataset=as_rows(features, labels),
            data_collator=stacked,
            regularizers=[outliers],
        )
        _run(alone, resume)
        outliers.clear()

    def _consolidate(self, trainer: Trainer, objective: TaskClassifier, part: Any) -> None:
        for elastic in self._of(ElasticWeightConsolidation):
            size = self.args.per_device_eval_batch_size
            loader = DataLoader(part, batch_size=size, collate_fn=trainer.data_collator)
            prepared = (trainer._prepare_inputs(batch) for batch in loader)
            elastic.consolidate(self.model, MaskedLogits(objective), prepared)

    def _measure(self, trainer: Trainer, task: int, record: TaskRecord) -> TaskRecord:
        """Return the record with the accuracies on all tasks so far."""
        seen = range(self.order.outputs(task).stop)
        pairs = [
            measured(trainer, self.test[j], seen, self.head, self.order.outputs(j))
            for j in range(task + 1)
        ]
        agnostic, aware = zip(*pairs, strict=True)
        return TaskRecord(
            ClassOrder(self.order.tasks[: task + 1], self.order.seed),
            self.args.seed,
            (*record.accuracies, agnostic),
            (*record.task_aware, aware) if self.task_aware else (),
        )

    def _save(self, task: int, record: TaskRecord, running: Path) -> None:
        """Put adapter, classifier and record into the task's folder, in one step."""
        if not self.args.should_save:
            return
        aside = self._folder / ASIDE / f"task-{task}"
        shutil.rmtree(aside.parent, ignore_errors=True)
        aside.mkdir(parents=True)
        with training_checkpoint():
            name = self.model.active_adapter
            self.model.save_pretrained(str(aside), selected_adapters=[name])
        record.write(aside)
        states = {r.name: r.state_dict() for r in self._of(ElasticWeightConsolidation)}
        if states:
            save_state(states, aside / STATE_FILE)
        list_files(aside)
        move(aside, task_folder(self._folder, task))
        shutil.rmtree(aside.parent, ignore_errors=True)
        shutil.rmtree(running, ignore_errors=True)

    def _of(self, kind: type[Any]) -> list[Any]:
        """The regularizers of a kind."""
        return [r for r in self.regularizers if isinstance(r, kind)]


def _run(trainer: Trainer, resume: bool) -> None:
    checkpoint = last_checkpoint(str(trainer.args.output_dir)) if resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _adapter_folder(folder: Path, name: str) -> Path:
    """Where PEFT puts an adapter of this name."""
    return folder if name == "default" else folder / name


def _layer(trainer: ClassIncrementalTrainer) -> Any:
    """The classifier that is trained: the active adapter's copy."""
    found: Any = trainer.model.get_base_model().get_submodule(trainer.head)
    return found.modules_to_save[trainer.model.active_adapter]


def _check(trainer: ClassIncrementalTrainer) -> None:
    """Check what can be known before the first task."""
    model, tasks = trainer.model, len(trainer.order.tasks)
    if not isinstance(model, PeftModel):
        raise TypeError(f"a {type(model).__name__} has no adapter; give what graftune.wrap returns")
    modules = dict(model.get_base_model().named_modules())
    if not isinstance(modules.get(trainer.head), ModulesToSaveWrapper):
        what = "is not trained with the adapter" if trainer.head in modules else "is not there"
        raise ValueError(
            f"the classifier {trainer.head!r} {what}.{nearest(trainer.head, modules)} Name it when "
            f"wrapping: modules_to_save=[{trainer.head!r}]"
        )
    if len(trainer.parts) != tasks or len(trainer.test) != tasks:
        raise ValueError(
            f"the order has {tasks} tasks, with {len(trainer.parts)} parts to train and "
            f"{len(trainer.test)} to measure; split both by the same order"
        )
    empty = [task for task, part in enumerate(trainer.test) if part is None or not len(part)]
    if empty:
        raise ValueError(f"task {empty[0]} has no images to measure; every task is measured")
    if trainer.outlier_epochs < 1:
        raise ValueError(f"outlier_epochs is {trainer.outlier_epochs}; it must be at least 1")
    config: Any = model.active_peft_config
    for each in getattr(config, "parts", [config]):
        if isinstance(each, TaskPoolConfig):
            each.check_task(tasks - 1)

"""OVOR: classes in ten tasks, one after the other, learned by one prompt and a growing classifier.

    accelerate launch examples/cil_ovor.py
    accelerate launch examples/cil_ovor.py --then outputs/cil_ovor/task-9    # an eleventh task
    python examples/cil_ovor.py --data my-pictures --tasks 10 --recipe coda_prompt
    accelerate launch examples/cil_ovor.py --data my-pictures --tasks 10 \
        --model google/vit-base-patch16-224-in21k --per_device_train_batch_size 128

Trains with the paper's settings (arXiv 2402.04129): Adam at 0.001, cosine, 40 epochs and 10 more
with virtual outliers; but in batches of 16, because a task of the embedded pictures has no more
than 48. `--data` takes whatever `graftune.integrations.data.load_images` takes: a folder with one
subfolder a class, or a Hub data set. Without it, the embedded CLIP's vision tower learns kinds of
emoji in a style it has never seen. `--then` goes on from a finished task's folder with the classes
of the data that it has not learned. What was interrupted goes on with `--resume`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor, HfArgumentParser, TrainingArguments, set_seed

import graftune
from graftune.integrations.class_incremental import (
    METRICS,
    ClassIncrementalTrainer,
    TaskRecord,
    TaskSplit,
    draw_curves,
    draw_matrix,
    split_tasks,
)
from graftune.integrations.data import ImageCollator, hold_out, load_images
from graftune.integrations.libraries.base_models import load_base_model

EMBEDDED = Path(__file__).resolve().parent / "embedded" / "clip"


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """What to train on what."""

    model: str | None = option(None, "A vision transformer by name, for --data; else the tower.")
    data: str | None = option(None, "A folder with a subfolder a class, or a Hub data set.")
    test_split: str | None = option(None, "The data's part to measure on; else a fifth held out.")
    tasks: int = option(10, "How many; pools are made for one more.")
    recipe: Literal["ovor", "l2p", "dual_prompt", "coda_prompt"] = option("ovor", "The method.")
    outlier_center: Literal["boundary", "origin"] | None = option(
        None, "Virtual outliers with any recipe, around these; else as the recipe has them."
    )
    outlier_epochs: int = option(10, "Epochs with virtual outliers, after a task's own.")
    task_aware: bool = option(False, "Measure with the task known as well.")
    then: str | None = option(None, "The folder of a finished task to go on from.")
    resume: bool = option(False, "Go on where a run in the output folder was interrupted.")


@dataclass
class Training(TrainingArguments):
    """transformers' training arguments, with the paper's defaults; the batch is smaller."""

    output_dir: str = "outputs/cil_ovor"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    lr_scheduler_type: str = "cosine"
    num_train_epochs: float = 40
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 256
    save_strategy: str = "no"
    logging_strategy: str = "no"
    disable_tqdm: bool | None = True
    report_to: str = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)


@dataclass(frozen=True)
class Data:
    """The tasks, and what each is measured on."""

    train: TaskSplit
    test: list[Any]


def embedded_tasks(options: Options, seed: int, before: TaskRecord | None) -> Data:
    """Kinds of emoji, drawn by the seed; after other tasks the next one."""
    from embedded.increments import load_increments

    if options.model is not None:
        raise ValueError("--model is for pictures of your own; give them with --data")
    first = before.done if before else 0
    data = load_increments(seed, first + 1 if before else options.tasks, first=first)
    return Data(data.train, list(data.test))


def own_tasks(options: Options, seed: int, before: TaskRecord | None) -> Data:
    """A data set in tasks; after other tasks, one of all its classes that are new."""
    data = load_images(options.data)
    if before is None:
        order, first = split_tasks(data, options.tasks, seed=seed).order, 0
    else:
        new = [name for name in data.features["label"].names if name not in before.order.names]
        order, first = before.order.then(new), before.done
    if options.test_split is not None:
        test = order.split(load_images(options.data, split=options.test_split))
        return Data(TaskSplit(order, tuple(order.split(data, first=first))), test)
    # Task by task, so that later classes do not change what is held out of the earlier ones.
    parts = [hold_out(part, 0.2, seed) for part in order.split(data)]
    return Data(TaskSplit(order, tuple(part for part, _ in parts)), [part for _, part in parts])


def base_model(options: Options, names: tuple[str, ...]) -> tuple[Any, str, Any]:
    """Return a vision transformer, its classifier's name, and what makes batches of pictures."""
    if options.model is not None:
        base = load_base_model(options.model, "image_classes", class_names=names, head="new")
        return base.model, str(base.new_head), ImageCollator(base.transform)
    from embedded.increments import vision_tower

    collator = ImageCollator(AutoImageProcessor.from_pretrained(EMBEDDED)) if options.data else None
    return vision_tower(len(names)), "classifier", collator


def adapt(options: Options, base: Any, head: str) -> Any:
    """Attach the recipe's adapter, or go on with one that was saved."""
    if options.then is not None:
        return graftune.load(base, options.then, is_trainable=True)
    tasks = options.tasks + 1  # one to go on with
    sizes = {
        "dual_prompt": {"tasks": tasks},
        "coda_prompt": {"tasks": tasks, "pool_size": 10 * tasks},
    }
    regularizers = list(graftune.recipes()[options.recipe].regularizers)
    if options.outlier_center is not None:
        regularizers = [r for r in regularizers if not isinstance(r, graftune.VirtualOutliers)]
        regularizers.append(graftune.VirtualOutliers(outlier_center=options.outlier_center))
    return graftune.wrap(
        base,
        options.recipe,
        regularizers=regularizers,
        modules_to_save=[head],
        **sizes.get(options.recipe, {}),
    )


def main() -> None:
    options, args = HfArgumentParser((Options, Training)).parse_args_into_dataclasses()
    before = TaskRecord.read(options.then) if options.then else None
    seed = before.seed if before else args.seed  # what was held out stays held out
    data = (own_tasks if options.data else embedded_tasks)(options, seed, before)
    set_seed(args.seed)
    base, head, collator = base_model(options, data.train.order.tasks[0])
    trainer = ClassIncrementalTrainer(
        adapt(options, base, head),
        args,
        train=data.train,
        test=data.test,
        head=head,
        data_collator=collator,
        outlier_epochs=options.outlier_epochs,
        task_aware=options.task_aware,
    )
    record = trainer.train(resume=options.then or options.resume)
    if args.should_save:
        write(Path(args.output_dir), record, options)
    trainer.end()


def write(folder: Path, record: TaskRecord, options: Options) -> None:
    """Write the numbers and two pictures beside the tasks' adapters, and show the numbers."""
    last = folder / f"task-{record.done - 1}"
    size = sum(file.stat().st_size for file in last.glob("*") if file.is_file())
    results = {**record.to_dict(), "bytes": size, "options": dataclasses.asdict(options)}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw_matrix(record.accuracies, folder / "matrix.png", options.recipe)
    draw_curves({options.recipe: record.accuracies}, folder / "curve.png")
    console = Console() if Console().is_terminal else Console(width=120)
    tasks = range(record.done)
    table = Table("after task", *map(str, tasks), title="Accuracy on each task, %", padding=(0, 0))
    for task, row in enumerate(record.accuracies):
        table.add_row(str(task), *(f"{value:.1f}" for value in row))
    console.print(table)
    numbers = Table("", "%", "definition")
    for name, value in record.metrics.items():
        numbers.add_row(name.replace("_", " "), f"{value:.1f}", METRICS[name][1])
    console.print(numbers)
    print(f"{last}: adapter and classifier of {len(record.order.names)} classes, {size:,} bytes")
    print(f"Written to {folder}: results.json, matrix.png, curve.png")


if __name__ == "__main__":
    # Of PEFT's making, for transformers' developers.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    main()
